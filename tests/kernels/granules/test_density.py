import pytest
import torch

from svg.kernels.granules import listed_density
from svg.kernels.granules.density import listed_density_reference
from svg.kernels.granules.reference import lists_of


@pytest.mark.parametrize("text", [0, 21])
@pytest.mark.parametrize("masked", [False, True])
def test_equals_the_pairs_counted_one_by_one(text, masked):
    video, size, rows, B, H = 333, 16, 64, 2, 3
    T, groups = 21, 6
    generator = torch.Generator().manual_seed(text)
    prompt = torch.tensor([5, text]) if masked and text else None
    words = torch.full((B,), text) if prompt is None else prompt
    tokens = torch.tensor(
        [[16] * 20 + [13] + [max(0, min(16, int(w) - 16 * i)) for i in range(-(-text // 16))] for w in words]
    )
    chosen = torch.rand(B, H, groups, T, generator=generator) < 0.3
    chosen[..., -1] = True
    chosen[0, 0, 0] = True  # a group that computes everything pays for no means
    lists = lists_of(chosen, tokens.int(), size, rows)
    share = {"video": video, "text": text, "size": size}
    expected = torch.zeros(B, H)
    for b in range(B):
        visible = video + int(words[b])
        for h in range(H):
            pairs = text * visible
            for g in range(groups):
                listed = lists.entries[lists.starts[b, h, g] : lists.starts[b, h, g] + lists.counts[b, h, g]].long()
                keys = int(tokens[b, listed].sum())
                pairs += (keys + (0 if keys == visible else T)) * min(rows, video - g * rows)
            expected[b, h] = pairs / ((video + text) * visible)
    torch.testing.assert_close(listed_density(lists, prompt, **share), expected)
    torch.testing.assert_close(listed_density_reference(lists, prompt, **share), expected)
