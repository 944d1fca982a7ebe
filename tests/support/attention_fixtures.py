import pytest
import torch

from svg.attend import dense_attention
from svg.engine.layout import TokenLayout
from svg.engine.state import RunState

LAYOUTS = {
    "no text": TokenLayout(3, 2, 5),
    "text first": TokenLayout(4, 2, 3, 7, "first"),
    "text last": TokenLayout(3, 3, 3, 5, "last"),
    "one frame": TokenLayout(1, 3, 4, 3, "last"),
}


def dense_output(qkv, layout, mask):
    """Dense attention [B, S, H, D] over the video and the text that a mask [2, T], or None, shows."""
    seen = None
    if mask is not None:
        seen = torch.ones(2, layout.total_tokens, dtype=torch.bool)
        seen[:, layout.text_slice] = mask
    return dense_attention(*(x.transpose(1, 2) for x in qkv), seen).transpose(1, 2)


@pytest.fixture(params=LAYOUTS.values(), ids=LAYOUTS.keys())
def layout(request):
    return request.param


@pytest.fixture
def make_mask():
    """Text mask [B, T] whose samples have different prompt lengths, padding on the right or on the left."""

    def make(layout, batch=2, side="right"):
        if not layout.text_tokens:
            return None
        lengths = torch.arange(batch)[:, None] * 2 + 1  # 1, 3, ...
        mask = torch.arange(layout.text_tokens) < lengths
        return mask if side == "right" else mask.flip(-1)

    return make


@pytest.fixture
def make_qkv():
    """Structured q, k, v [B, S, H, D]: smooth over the video, so that clusters and bands mean something."""

    def make(layout, batch=2, heads=3, dim=16, seed=0, dtype=torch.float32):
        generator = torch.Generator().manual_seed(seed)
        basis = torch.randn(4, heads, dim, generator=generator)
        place = torch.linspace(0, 6, layout.total_tokens)[:, None] * torch.arange(1, 5)  # [S, 4]
        smooth = torch.einsum("sc,chd->shd", place.sin(), basis)
        noise = torch.randn(3, batch, layout.total_tokens, heads, dim, generator=generator)
        q, k, v = smooth + noise
        return q.to(dtype), k.to(dtype), v.to(dtype)

    return make


@pytest.fixture
def make_state():
    """A state inside a run, past the warm-up."""

    def make(config, layout, step=5, num_steps=10, num_layers=4, branch="cond"):
        state = RunState(config, num_layers)
        state.begin_run()
        state.begin_forward(step, num_steps, branch, layout)
        return state

    return make


@pytest.fixture
def token_map():
    """The S x S map of one head of a plan, in original order."""

    def expand(plan, b, h):
        m = plan.map_index[b, h].item()
        rows = torch.repeat_interleave(torch.arange(plan.q_sizes.shape[1]), plan.q_sizes[m].long())
        columns = torch.repeat_interleave(torch.arange(plan.k_sizes.shape[1]), plan.k_sizes[m].long())
        tokens = rows.numel()
        out = torch.zeros(tokens, tokens, dtype=torch.bool)
        q_order, k_order = plan.q_permutation[b, h].long(), plan.k_permutation[b, h].long()
        out[q_order[:, None], k_order] = plan.block_map[m][rows[:, None], columns]
        return out

    return expand


@pytest.fixture
def masked_attention():
    """Attention under an S x S map, written out; [S, D] each."""

    def attention(q, k, v, seen):
        logits = (q.double() @ k.double().T) * q.shape[-1] ** -0.5
        return logits.masked_fill(~seen, -torch.inf).softmax(-1) @ v.double()

    return attention
