"""8-bit training attention, forward and backward, beside SDPA's FlashAttention and cuDNN in bf16; and other launch rows."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from svg.kernels import training_attention
from svg.kernels.common import target
from svg.kernels.quantize.channels import statistics
from svg.kernels.training import backward, forward
from svg.kernels.training.inputs import channel_scale, empty_gradients, pack_gradients, pack_keys, pack_queries
from svg.kernels.training.op import PRODUCTS
from svg.kernels.training.sequences import layouts

from ..functional.training import training_attention as attention_with_gradients
from .sweep import replaced, time_or_none
from .timing import median_ms

DEVICE = "cuda"
INPUTS = "normal"
BASELINES = {"flash": SDPBackend.FLASH_ATTENTION, "cudnn": SDPBackend.CUDNN_ATTENTION}


def bench_shape(bench, S: int, heads: int, dim: int, prefix: str, is_causal: bool = False, sweep: bool = False) -> None:
    """Forward and backward of one shape, against PyTorch's, and their parts.

    Args:
        bench: collects the results.
        S: tokens.
        heads: H.
        dim: D.
        prefix: what follows "training/int8/" in a key, such as "S32768".
        is_causal: query i sees keys 0 .. i.
        sweep: also time other launches.
    """
    arguments, grad = inputs(S, heads, dim)
    shape = f"B=1 H={heads} S={S} D={dim}" + (" causal" if is_causal else "")
    flops = 14 * heads * S * S * dim / (2 if is_causal else 1)  # 2 products forward, 5 backward
    about = {"density": 1, "inputs": INPUTS}
    times = {}
    for name, backend in BASELINES.items():
        with sdpa_kernel(backend):
            times[name] = _ms(partial(F.scaled_dot_product_attention, is_causal=is_causal), arguments, grad)
        key = f"training/{name}/{prefix}"
        bench.note(f"{key}/ms", times[name], "ms", shape, **about)
        bench.note(f"{key}/tops", flops / times[name] / 1e9, "TOPS", shape, **about)
    about["baseline"] = f"SDPA FlashAttention bf16 {times['flash']:.2f} ms"
    for products in PRODUCTS:
        op = partial(attention_with_gradients, is_causal=is_causal, gradients=products)
        ms = _ms(op, arguments, grad)
        key = f"training/int8/{prefix}" if products == "int8" else f"training/int8_{products}/{prefix}"
        bench.note(f"{key}/ms", ms, "ms", shape, **about)
        bench.note(f"{key}/tops", flops / ms / 1e9, "TOPS", shape, **about)
        for name in BASELINES:
            bench.note(f"{key}/speedup_vs_{name}", times[name] / ms, "x", shape, **about)
        _parts(bench, arguments, grad, key, shape, about, is_causal, products, sweep)


def _ms(op: Callable, arguments: tuple[Tensor, ...], grad: Tensor) -> float:
    """Milliseconds of forward and backward."""
    return median_ms(lambda: torch.autograd.grad(op(*arguments), arguments, grad))


@torch.no_grad()
def _parts(
    bench,
    arguments: tuple[Tensor, ...],
    grad: Tensor,
    key: str,
    shape: str,
    about: dict,
    is_causal: bool,
    products: str,
    sweep: bool,
) -> None:
    q, k, v = arguments
    scale, (rows, columns) = q.shape[-1] ** -0.5, layouts(q, k, None, None)
    stats = statistics(k, v)
    queries, q_scale = pack_queries(q, rows, scale)
    out, kept = training_attention(q, k, v, is_causal=is_causal, sm_scale=scale)
    gradients = backward.packed_gradients(grad, out, kept, rows, products)
    dq, dk, dv = empty_gradients(out, k.shape[1], k.shape[2])
    width = kept.queries.shape[2]
    row = target.launch_row(backward.LAUNCH, q.device)[products, width]

    def attend(packed):
        forward.attend_packed(queries, q_scale, packed, channel_scale(stats), stats.v_mean, rows, columns, q, is_causal)

    def query(row):
        backward.query_gradient(row, dq, kept, gradients, rows, columns, is_causal, scale, products)

    def keys(*pair):
        launch = backward.BackwardLaunch(row.query, *pair)
        backward.key_gradients(launch, dk, dv, kept, gradients, rows, columns, is_causal, products)

    packed = pack_keys(k, v, stats, columns)
    bench.note(f"{key}/attention_ms", median_ms(lambda: attend(packed)), "ms", shape, **about)
    bench.note(f"{key}/dq_ms", median_ms(lambda: query(row.query)), "ms", shape, **about)
    bench.note(f"{key}/dk_dv_ms", median_ms(lambda: keys(row.key, row.value)), "ms", shape, **about)
    if not sweep:
        return
    # Other launches are of the kernels that every GPU has, which read other copies.
    packed = pack_keys(k, v, stats, columns, wide=False)
    gradients = pack_gradients(
        grad, out, kept.v_mean, kept.queries, kept.q_scale, kept.lse, rows, wide=products == "bf16"
    )
    for other in forward.candidates() if products == "int8" else ():
        with replaced(target.launch_row(forward.LAUNCH, q.device), width, other):
            _note(bench, f"{key}/sweep/forward_{other.name()}", lambda: attend(packed), shape, about)
    for other in backward.query_candidates(products):
        _note(bench, f"{key}/sweep/dq_{other.name()}", lambda other=other: query(other), shape, about)
    for pair in backward.key_candidates(products):
        name = "_dv_".join(other.name() for other in pair if other is not None)
        _note(bench, f"{key}/sweep/dk_{name}", lambda pair=pair: keys(*pair), shape, about)


def _note(bench, key: str, op: Callable, shape: str, about: dict) -> None:
    ms = time_or_none(op)
    if ms is None:
        bench.say(f"{key} does not fit this GPU: left out")
    else:
        bench.note(f"{key}/ms", ms, "ms", shape, **about)


def inputs(
    S: int, heads: int, dim: int, dtype: torch.dtype = torch.bfloat16
) -> tuple[tuple[Tensor, Tensor, Tensor], Tensor]:
    """q, k, v that want gradients, and the gradient of the output: [1, H, S, D], views of [1, S, H, D], N(0, 1).

    Args:
        S: tokens.
        heads: H.
        dim: D.
        dtype: of all.
    """
    q, k, v, grad = (torch.randn(1, S, heads, dim, device=DEVICE, dtype=dtype).transpose(1, 2) for _ in range(4))
    return (q.requires_grad_(), k.requires_grad_(), v.requires_grad_()), grad
