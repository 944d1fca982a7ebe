"""INT8 attention while a transformer is trained: its gradients, what comes back, and the fine-tuning example."""

import argparse
import importlib
import sys
from pathlib import Path

import pytest
import torch
from torch.nn.functional import cosine_similarity

import svg

SCRIPTS = Path(__file__).parents[2] / "scripts" / "tiny"
pytestmark = pytest.mark.filterwarnings("ignore:svg.training_attention computes its plain PyTorch reference")


def loss_and_gradients(transformer, inputs, target):
    transformer.zero_grad()
    loss = (transformer(**inputs, return_dict=False)[0] - target).square().mean()
    loss.backward()
    return loss.item(), torch.cat([p.grad.flatten() for p in transformer.parameters() if p.grad is not None])


def wan_inputs(batch=2):
    return {
        "hidden_states": torch.randn(batch, 16, 3, 8, 12),
        "timestep": torch.tensor([300.0, 700.0])[:batch],
        "encoder_hidden_states": torch.randn(batch, 5, 32),
    }


def test_gradients_of_all_weights_are_those_of_dense_attention(load):
    transformer = load("wan").transformer
    inputs, target = wan_inputs(), torch.randn(2, 16, 3, 8, 12)
    dense_loss, dense = loss_and_gradients(transformer, inputs, target)
    for gradients in ("int8", "bf16"):
        with svg.int8_training(transformer, gradients) as same:
            assert same is transformer
            loss, found = loss_and_gradients(transformer, inputs, target)
        assert loss != dense_loss and abs(loss / dense_loss - 1) < 1e-3
        assert cosine_similarity(found, dense, 0) > 0.995
    assert loss_and_gradients(transformer, inputs, target)[0] == dense_loss


@pytest.mark.parametrize("checkpointing", [False, True])
def test_linears_in_int8_give_nearly_the_same_gradients(load, checkpointing):
    transformer = load("wan").transformer
    inputs, target = wan_inputs(), torch.randn(2, 16, 3, 8, 12)
    dense_loss, dense = loss_and_gradients(transformer, inputs, target)
    if checkpointing:
        transformer.train().enable_gradient_checkpointing()
    with svg.int8_training(transformer, linears="all"):
        linear = transformer.blocks[0].ffn.net[2]
        loss, found = loss_and_gradients(transformer, inputs, target)
        steps = linear.forward.steering.steps
    assert steps == 1 and loss != dense_loss and abs(loss / dense_loss - 1) < 3e-3
    assert cosine_similarity(found, dense, 0) > 0.99
    transformer.eval()
    assert "forward" not in vars(linear) and loss_and_gradients(transformer, inputs, target)[0] == dense_loss


def test_linears_in_int8_under_autocast_and_with_frozen_weights(load):
    transformer = load("wan").transformer.requires_grad_(False)
    chosen = transformer.blocks[0].ffn.net[2].weight.requires_grad_()
    with svg.int8_training(transformer, linears="feed_forward"), torch.autocast("cpu", torch.bfloat16):
        transformer(**wan_inputs(), return_dict=False)[0].float().square().mean().backward()
    assert chosen.grad.dtype == torch.float32 and chosen.grad.abs().sum() > 0


def test_int8_training_fits_as_16_bits_do(load):
    curves = {}
    for linears in ("none", "all"):
        torch.manual_seed(5)
        transformer = load("wan").transformer
        optimizer = torch.optim.AdamW(transformer.parameters(), lr=3e-3)
        inputs, target = wan_inputs(), torch.randn(2, 16, 3, 8, 12)
        with svg.int8_training(transformer, linears=linears):
            curves[linears] = []
            for _ in range(25):
                optimizer.zero_grad()
                loss = (transformer(**inputs, return_dict=False)[0] - target).square().mean()
                loss.backward()
                optimizer.step()
                curves[linears].append(loss.item())
    assert curves["none"][-1] < 0.97 * curves["none"][0]
    assert abs(curves["all"][-1] / curves["none"][-1] - 1) < 0.01


def test_processors_come_back_whatever_happens(load):
    transformer = load("wan").transformer
    originals = [block.attn1.processor for block in transformer.blocks]
    with pytest.raises(KeyError), svg.int8_training(transformer):
        assert all(block.attn1.processor not in originals for block in transformer.blocks)
        raise KeyError
    assert all(block.attn1.processor is kept for block, kept in zip(transformer.blocks, originals, strict=True))


def test_checkpointed_activations_give_the_same_gradients(load):
    transformer = load("wan").transformer
    inputs, target = wan_inputs(), torch.randn(2, 16, 3, 8, 12)
    with svg.int8_training(transformer):
        _, expected = loss_and_gradients(transformer, inputs, target)
        transformer.enable_gradient_checkpointing()
        transformer.train()
        _, found = loss_and_gradients(transformer, inputs, target)
    assert torch.equal(found, expected)


def test_a_compiled_transformer_stays_one_graph(load):
    transformer = load("wan").transformer
    inputs, target = wan_inputs(1), torch.randn(1, 16, 3, 8, 12)
    with svg.int8_training(transformer):
        loss, expected = loss_and_gradients(transformer, inputs, target)
        transformer.compile(backend="aot_eager", fullgraph=True)
        again, found = loss_and_gradients(transformer, inputs, target)
    assert abs(again / loss - 1) < 1e-4 and cosine_similarity(found, expected, 0) > 0.9999


def test_text_in_the_sequence_is_trained_too(load):
    transformer = load("cogvideox_2b").transformer
    frames = torch.randn(1, 3, 4, 8, 12)
    inputs = {"hidden_states": frames, "encoder_hidden_states": torch.randn(1, 16, 32), "timestep": torch.tensor([500])}
    _, dense = loss_and_gradients(transformer, inputs, torch.ones_like(frames))
    with svg.int8_training(transformer):
        _, found = loss_and_gradients(transformer, inputs, torch.ones_like(frames))
    assert cosine_similarity(found, dense, 0) > 0.995


def test_an_accelerated_transformer_is_refused(load):
    pipe = svg.accelerate(load("wan"), svg.DenseConfig())
    with pytest.raises(ValueError, match="svg.restore"), svg.int8_training(pipe.transformer):
        pass


def test_padded_prompts_in_the_sequence_are_refused():
    from svg.pipelines.training import _attend

    q = torch.randn(1, 8, 2, 16)
    with pytest.raises(NotImplementedError, match="trim prompts"):
        _attend("int8", q, q, q, torch.ones(1, 4, dtype=torch.bool))


def test_the_example_gives_both_curves(monkeypatch):
    monkeypatch.syspath_prepend(SCRIPTS)
    script = importlib.import_module("finetune")
    args = argparse.Namespace(
        model=Path(svg.pipelines.__file__).parent / "tiny-wan", size="5x32x32", shape="ring", clips=2, batch=2, steps=2,
        lr=1e-4, gradients="int8", linears="all", seed=0, device="cpu",
    )  # fmt: skip
    latents, texts = script.data(args)
    assert latents.shape == (2, 16, 2, 8, 8) and texts.shape == (2, 512, 128)
    assert latents.abs().mean() < 3
    bf16, int8 = (script.finetune(args, latents, texts, name) for name in ("bf16", "int8"))
    assert len(bf16) == len(int8) == 2 and bf16 != int8
    assert all(abs(a / b - 1) < 0.02 for a, b in zip(int8, bf16, strict=True))
    for name in ("finetune", "train", "world"):
        sys.modules.pop(name, None)
