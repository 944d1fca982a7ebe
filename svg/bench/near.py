"""near at 75,600 tokens: whole calls with a fresh plan and with a kept one, their parts, and the error of the output."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch
from torch import Tensor

from svg.configs import load_preset
from svg.kernels.clustering.kmeans import kmeans
from svg.kernels.granules import cut_granules, granule_attention, granule_scores, select_granules

from ..attend import attend
from ..config import MethodConfig, NearConfig, SVG2Config
from ..engine.state import LayerState, RunState
from ..methods.dense import dense_attention
from ..methods.near.plan import exact_share, plan
from .inputs import Inputs
from .timing import median_ms

DENSITY = 0.25
ROWS = 1024  # query rows whose output is compared with exact attention
ALWAYS = {"warmup_steps": 0.0, "warmup_layers": 0.0}
PRESET = "wan2.1-t2v-720p"


def bench_near(bench, inputs: Inputs, svg2: SVG2Config) -> None:
    """Whole calls in 16 and 8 bits against dense cuDNN, and the output's error against svg2's at the same density.

    Args:
        bench: collects the results.
        inputs: of one call.
        svg2: the published rule's settings at the same density.
    """
    q, k, v = inputs.heads_first()
    dense = median_ms(lambda: dense_attention(q, k, v, backend="cudnn"), 5)
    rows = torch.linspace(0, q.shape[2] - 1, ROWS, device=q.device).long()
    exact = _exact(q[:, :, rows], k, v)
    published, _, _ = _call(svg2, inputs)
    errors = {"svg2": _error(published, exact, rows)}
    tokens = inputs.layout.total_tokens
    shape = f"B=1 H={q.shape[1]} S={tokens} D={q.shape[-1]}"
    for precision, name in (("native", "bf16"), ("int8-fp8", "int8_fp8")):
        for kept in (False, True):
            config = _settings(precision=precision, refresh=1 << 20 if kept else 1)
            out, density, again = _call(config, inputs)
            ms = median_ms(again)
            key = f"near/{name}/S{tokens}/density{DENSITY}" + ("/reused" if kept else "")
            about = {"density": density, "inputs": inputs.description, "baseline": f"cuDNN dense {dense:.2f} ms"}
            bench.note(f"{key}/ms", ms, "ms", shape, **about)
            bench.note(f"{key}/speedup_vs_cudnn", dense / ms, "x", shape, **about)
            if not kept:
                errors[name] = _error(out, exact, rows)
                about["baseline"] = f"svg2 at density {DENSITY}: {errors['svg2']:.4f}"
                bench.note(f"{key}/output_error", errors[name], "relative l2", shape, **about)
                bench.note(f"{key}/error_vs_svg2", errors[name] / errors["svg2"], "x", shape, **about)
    _parts(bench, inputs, shape, f"near/bf16/S{tokens}/density{DENSITY}")


def _settings(**options) -> NearConfig:
    """The preset's settings, sparse in every step and layer."""
    config = load_preset(PRESET).config("near")
    assert isinstance(config, NearConfig)
    return dataclasses.replace(config, budget=DENSITY, **ALWAYS, **options)


def _call(config: MethodConfig, inputs: Inputs) -> tuple[Tensor, float, Callable[[], Tensor]]:
    """Output [B, H, S, D] and density of a second call, and a function that makes one more."""
    state = RunState(config, num_layers=1)
    state.begin_forward(0, 1, "cond", inputs.layout)

    def again() -> Tensor:
        return attend(inputs.q, inputs.k, inputs.v, state, 0)

    again()
    out = again().transpose(1, 2)
    return out, state.records[-1].density.mean().item(), again


def _parts(bench, inputs: Inputs, shape: str, key: str) -> None:
    """Where the time of a call goes."""
    q, k, v = inputs.heads_first()
    config = _settings()
    memory = LayerState(0, "cond", 0)
    found = plan(q, k, v, config, memory, inputs.layout)
    chosen, (lists,) = found.chosen, found.chosen.lists
    granules = cut_granules(k, v, chosen.k_order, config.granule)
    scores = granule_scores(q, chosen.q_order, granules, rows=config.rows, pool=config.pool)
    share = exact_share(DENSITY, config, inputs.layout)
    centroids = dict(memory.cache)
    options = {"floor": config.floor, "size": config.granule, "rows": config.rows}
    parts = {
        "plan": lambda: plan(q, k, v, config, memory, inputs.layout),
        "attention": lambda: granule_attention(q, granules, lists, q_order=chosen.q_order),
        "cut": lambda: cut_granules(k, v, chosen.k_order, config.granule),
        "statistics": lambda: cut_granules(k, v, chosen.k_order, config.granule, gather=False),
        "scores": lambda: granule_scores(q, chosen.q_order, granules, rows=config.rows, pool=config.pool),
        "select": lambda: select_granules(scores, granules.tokens, budget=share, **options),
        "kmeans_k": lambda: kmeans(k, centroids["k_centroids"], config.iterations),
    }
    if "q_centroids" in centroids:  # where a curve orders the queries there are none
        parts["kmeans_q"] = lambda: kmeans(q, centroids["q_centroids"], config.iterations)
    for name, part in parts.items():
        bench.note(f"{key}/{name}_ms", median_ms(part), "ms", shape, inputs=inputs.description)


def _exact(rows: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention of some query rows [B, H, R, D] over all keys in fp32, a head at a time."""
    out = []
    for h in range(k.shape[1]):
        logits = rows[:, h].float() @ k[:, h].float().mT * k.shape[-1] ** -0.5
        out.append(logits.softmax(-1) @ v[:, h].float())
    return torch.stack(out, 1)


def _error(out: Tensor, exact: Tensor, rows: Tensor) -> float:
    return ((out[:, :, rows].float() - exact).norm() / exact.norm()).item()
