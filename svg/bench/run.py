"""`svg bench`: ceilings, our kernels and the peers that are installed, on one GPU in one run.

Every time is the median of CUDA-event times after warm-up calls. Sparse methods are measured on structured inputs (see
inputs.py), and useful work counts only (query, key) pairs inside selected clusters, never tile tails.
"""

from __future__ import annotations

import datetime
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from svg.kernels import block_sparse_attention, gather_tokens, kmeans, scatter_tokens, sort_labels

from ..attend import attend
from ..config import SELECTIONS, MethodConfig, SpargeConfig, SVG1Config, SVG2Config
from ..engine.layout import TokenLayout
from ..engine.plan import Plan
from ..engine.state import LayerState, RunState
from ..environment import versions
from ..methods.dense import dense_attention
from ..methods.svg2 import plan as svg2
from . import quantised, sparge, training
from .elementwise import bench_elementwise
from .inputs import Inputs, recorded, synthetic
from .layers import bench_layers as layers_of
from .linears import bench_linears as linears_of
from .near import bench_near as near_of
from .peers import PEERS
from .scale import bench_scale as scale_of
from .sweep import sweep_assign, sweep_attention
from .timing import median_ms
from .whole_blocks import bench_whole_blocks as whole_blocks_of

WAN_720P = TokenLayout(21, 45, 80)
HUNYUAN_720P = TokenLayout(33, 45, 80, 256, "last")
HEADS, DIM = 8, 128
TRAINING_TOKENS = 32_768
MATMUL, COPY = 8192, 1 << 30  # side of the matrix product, bf16 elements of the copy
DEVICE = "cuda"


@dataclass
class Bench:
    """What the sections share: how to time, the inputs, and the results.

    Args:
        command: the command line, for the report.
        show: called with every result's key and fields, as soon as it is there.
        say: called with a line about what is left out, and why.
        sweep: also time other tile sizes.
    """

    command: str
    show: Callable[[str, dict[str, Any]], None]
    say: Callable[[str], None]
    sweep: bool = False
    results: dict[str, dict[str, Any]] = field(default_factory=dict)
    _versions: dict[str, Any] | None = None
    _inputs: dict[tuple, Inputs] = field(default_factory=dict)

    def note(self, key: str, value: float, unit: str, shape: str, *, density=None, inputs=None, baseline=None) -> None:
        """Keep and show one result."""
        if self._versions is None:
            self._versions = bench_versions()
        entry = {
            "value": float(value), "unit": unit, "shape": shape, "density": None if density is None else float(density),
            "inputs": inputs, "baseline": baseline, "versions": self._versions, "command": self.command,
            "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d"),
        }  # fmt: skip
        self.results[key] = entry
        self.show(key, entry)

    def inputs(self, layout: TokenLayout, heads: int, dim: int = DIM) -> Inputs:
        """Recorded inputs, or synthetic ones where Diffusers is missing, which is said."""
        key = (layout, heads, dim)
        if key not in self._inputs:
            self._inputs.clear()  # 100 MB and more each
            self._inputs[key] = self._make(layout, heads, dim)
        return self._inputs[key]

    def _make(self, layout: TokenLayout, heads: int, dim: int) -> Inputs:
        try:
            import diffusers  # noqa: F401
        except ImportError:
            self.say("inputs are synthetic: recording tiny-wan needs the package diffusers")
            return synthetic(layout, heads, dim, DEVICE)
        return recorded(layout, heads, dim, DEVICE)


def bench_versions() -> dict[str, str | None]:
    """Versions behind the numbers."""
    found = versions()
    return {
        **{name: found[name] for name in ("svg-video", "python", "torch", "triton", "diffusers")},
        "cuda": torch.version.cuda,
        "cudnn": str(torch.backends.cudnn.version()),
        **{name: peer.version() for name, peer in PEERS.items() if peer.version()},
    }


def run(what: Sequence[str], bench: Bench) -> None:
    """Run the ceilings and some sections, in the order of SECTIONS.

    Args:
        what: names of SECTIONS, or "all" among them.
        bench: collects the results.

    Raises:
        ValueError: there is no CUDA device, or no such section.
    """
    for name in what:
        if name not in (*SECTIONS, "all"):
            raise ValueError(f"what must be among {', '.join(SECTIONS)}, all, got {name!r}")
    _require_gpu()
    with torch.inference_mode():
        bench_ceilings(bench)
        for name, section in SECTIONS.items():
            if name in what or "all" in what:
                section(bench)


def _require_gpu() -> None:
    if not torch.cuda.is_available():
        raise ValueError("svg bench needs a CUDA device, got none: the numbers are about GPUs, run it on one")


def bench_ceilings(bench: Bench) -> None:
    """What the GPU can do at best: bf16 matrix product and copy."""
    n = MATMUL
    a, b = (torch.randn(n, n, device=DEVICE, dtype=torch.bfloat16) for _ in range(2))
    ms = median_ms(lambda: a @ b, 20)
    bench.note("ceiling/matmul/bf16/tflops", 2 * n**3 / ms / 1e9, "TFLOP/s", f"{n}^3", inputs="normal")
    bench.note("ceiling/copy/tb_per_s", _copy_tb_per_s(), "TB/s", f"{2 * COPY >> 20} MiB read, as many written")


def _copy_tb_per_s() -> float:
    x = torch.zeros(COPY, device=DEVICE, dtype=torch.bfloat16)
    y = torch.empty_like(x)
    return 2 * x.nbytes / median_ms(lambda: y.copy_(x)) / 1e9


def bench_attention(bench: Bench) -> None:
    """The block-sparse kernel alone, dense attention beside it, and the peers."""
    _attention(bench, WAN_720P, HEADS, (0.10, 0.25, 0.50))
    _attention(bench, HUNYUAN_720P, HEADS // 2, (0.25,))


def bench_whole_blocks(bench: Bench) -> None:
    """Block-sparse kernels alone on random maps of whole blocks, NVIDIA's beside ours."""
    whole_blocks_of(bench, WAN_720P.total_tokens, HEADS, DIM, DEVICE)


def _attention(bench: Bench, layout: TokenLayout, heads: int, densities: tuple[float, ...]) -> None:
    inputs = bench.inputs(layout, heads)
    q, k, v = inputs.heads_first()
    S = layout.total_tokens
    shape = f"B=1 H={heads} S={S} D={DIM}"
    dense_flops = 4 * heads * S * S * DIM
    dense = {}
    for backend in ("cudnn", "flash"):
        dense[backend] = median_ms(lambda backend=backend: dense_attention(q, k, v, backend=backend), 5)
        key = f"dense/{backend}/bf16/S{S}/tflops"
        bench.note(key, dense_flops / dense[backend] / 1e9, "TFLOP/s", shape, density=1, inputs=inputs.description)
    baseline = f"cuDNN dense {dense['cudnn']:.2f} ms"
    for density, selection in itertools.product(densities, SELECTIONS):
        plan = cluster_plan(inputs, density, selection)
        got = plan.density().mean().item()
        # Tiles are what ships for speed; the paper's clusters stand beside them.
        prefix = f"block_sparse/bf16/S{S}/density{density:.2f}" + ("/clusters" if selection == "clusters" else "")
        sorted_k, sorted_v = _sorted(plan, k, v)

        def sparse(plan=plan, k=sorted_k, v=sorted_v):
            return _block_sparse(plan, q, k, v)

        ms = median_ms(sparse)
        tflops = got * dense_flops / ms / 1e9
        about = {"density": got, "inputs": inputs.description, "baseline": baseline}
        bench.note(f"{prefix}/tflops", tflops, "TFLOP/s", shape, **about)
        bench.note(f"{prefix}/speedup_vs_cudnn", dense["cudnn"] / ms, "x", shape, **about)
        bench.note(f"{prefix}/recall", recall(plan, q, k), "of the attention mass", shape, **about)
        for name, peer in PEERS.items():
            if peer.block_sparse and density == 0.25:
                _peer(bench, peer, name, prefix, (q, sorted_k, sorted_v, plan), got * dense_flops, shape, about)
        if bench.sweep and density == 0.25:
            sweep_attention(bench, sparse, f"{prefix}/sweep", got * dense_flops, shape, about, DIM)
    for name, peer in PEERS.items():
        if peer.dense:
            about = {"density": 1, "inputs": inputs.description, "baseline": baseline}
            _peer(bench, peer, name, f"dense/{name}/S{S}", (q, k, v), dense_flops, shape, about)


def _peer(bench, peer, name, prefix, arguments, flops, shape, about) -> None:
    if not peer.version():
        return bench.say(f"{name} is not installed: left out")
    try:
        op = (peer.block_sparse or peer.dense)(*arguments)
        ms = median_ms(op, 5)
    except peer.errors as error:
        return bench.say(f"{name} could not run here ({type(error).__name__}: {str(error)[:120]}): left out")
    bench.note(f"{prefix}/{name}/tflops", flops / ms / 1e9, "TFLOP/s", shape, **about)


def cluster_plan(
    inputs: Inputs, density: float, selection: str = "tiles", q_clusters: int = 300, k_clusters: int = 1000
) -> Plan:
    """SVG2's plan at a forced density: the heaviest key blocks of each query block, up to the budget.

    Args:
        inputs: what to cluster, in 20 iterations.
        density: budget.
        selection: "tiles" or "clusters".
        q_clusters, k_clusters: numbers of clusters.

    Returns:
        The plan.
    """
    clusters = {"num_q_clusters": q_clusters, "num_k_clusters": k_clusters}
    config = forced(density, first_iterations=20, selection=selection, **clusters)
    return svg2.plan(*inputs.heads_first(), config, LayerState(0, "cond", 0), inputs.layout)


def forced(density: float, selection: str = "tiles", **settings) -> SVG2Config:
    """SVG2 settings under which every query block spends its whole budget, and no step or layer is dense."""
    always = {"warmup_steps": 0.0, "warmup_layers": 0.0, "top_p": 1.0, "min_k_ratio": 0.0}
    return SVG2Config(budget=density, selection=selection, **always, **settings)


def _block_sparse(plan: Plan, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    out = block_sparse_attention(
        q, k, v, plan.block_map, plan.q_sizes, plan.k_sizes,
        map_index=plan.map_index, q_permutation=plan.q_permutation,
    )  # fmt: skip
    assert isinstance(out, Tensor)  # alone, without return_lse
    return out


def _sorted(plan: Plan, *several: Tensor) -> list[Tensor]:
    """Keys, or values, in a plan's order."""
    permutation = plan.k_permutation
    assert permutation is not None  # what SVG2 plans has one
    return [gather_tokens(x, permutation) for x in several]


def recall(plan: Plan, q: Tensor, k: Tensor, rows: int = 64) -> float:
    """Share of dense attention's mass that a plan keeps, over evenly spread query rows.

    Args:
        plan: the plan.
        q, k: [B, H, S, D] in original order.
        rows: query rows a head.

    Returns:
        The mean over rows and heads.
    """
    S = q.shape[2]
    place = torch.linspace(0, S - 1, rows, device=q.device).long()  # sorted positions
    kept = []
    for b, h in torch.cartesian_prod(*(torch.arange(n) for n in q.shape[:2])).tolist():
        m = plan.map_index[b, h].long()
        cluster = torch.searchsorted(plan.q_sizes[m].cumsum(0), place, right=True)
        k_cluster = torch.searchsorted(plan.k_sizes[m].cumsum(0), torch.arange(S, device=q.device), right=True)
        mask = plan.block_map[m][cluster][:, k_cluster]  # [rows, S], sorted keys
        row, column = (p if p is None else p[b, h].long() for p in (plan.q_permutation, plan.k_permutation))
        picked = q[b, h, place if row is None else row[place]].float()
        keys = k[b, h] if column is None else k[b, h, column]
        mass = (picked @ keys.float().T * q.shape[-1] ** -0.5).softmax(-1)
        kept.append((mass * mask).sum(-1).mean())
    return torch.stack(kept).mean().item()


def bench_kmeans(bench: Bench) -> None:
    """One iteration of assignment and update; the sort that the permutation needs comes with it."""
    inputs = bench.inputs(WAN_720P, HEADS)
    x = inputs.heads_first()[1]
    S = x.shape[2]
    shape = f"B=1 H={HEADS} S={S} D={DIM}"
    for clusters in (1000, 300):
        start = x[:, :, torch.randperm(S, device=DEVICE)[:clusters]].float()
        start = kmeans(x, start, 5).centroids
        ms = median_ms(lambda start=start: kmeans(x, start, 4)) / 4
        key = f"kmeans/S{S}/K{clusters}"
        bench.note(f"{key}/ms_per_iteration", ms, "ms", shape, inputs=inputs.description)
        for name, peer in PEERS.items():
            if peer.kmeans and peer.version():
                time = median_ms(peer.kmeans(x, start, 4)) / 4
                bench.note(f"{key}/{name}/ms_per_iteration", time, "ms", shape, inputs=inputs.description)
        if bench.sweep:
            sweep_assign(bench, x, start, f"{key}/sweep", shape, inputs.description)


def bench_permute(bench: Bench) -> None:
    """Sorting labels, gathering and scattering rows."""
    inputs = bench.inputs(WAN_720P, HEADS)
    x = inputs.heads_first()[1]
    S = x.shape[2]
    shape = f"B=1 H={HEADS} S={S} D={DIM}"
    labels = kmeans(x, x[:, :, :1000].float(), 2).labels
    ms = median_ms(lambda: sort_labels(labels, 1000))
    bench.note(f"permute/S{S}/K1000/sort_ms", ms, "ms", shape, inputs=inputs.description)
    order, _ = sort_labels(labels, 1000)
    copy = _copy_tb_per_s()
    moved = gather_tokens(x, order)
    tb = 2 * x.nbytes / median_ms(lambda: gather_tokens(x, order), 20) / 1e9
    about = {"inputs": inputs.description, "baseline": f"copy {copy:.2f} TB/s"}
    bench.note("permute/copy_bandwidth_fraction", tb / copy, "of copy bandwidth", shape, **about)
    tb = 2 * x.nbytes / median_ms(lambda: scatter_tokens(moved, order), 20) / 1e9
    bench.note("permute/scatter/copy_bandwidth_fraction", tb / copy, "of copy bandwidth", shape, **about)


def bench_near(bench: Bench) -> None:
    """The whole near call in 16 and 8 bits, its parts and its error beside svg2's."""
    near_of(bench, bench.inputs(WAN_720P, HEADS), forced(0.25))


def bench_svg1(bench: Bench) -> None:
    """The whole SVG1 call: profiling, permutation, attention."""
    config = SVG1Config(density=0.25, warmup_steps=0.0, warmup_layers=0.0)
    _whole_call(bench, config, bench.inputs(WAN_720P, HEADS))


def bench_svg2(bench: Bench) -> None:
    """The whole SVG2 call from warm centroids, and the share that is not attention."""
    inputs = bench.inputs(WAN_720P, HEADS)
    q, k, v = inputs.heads_first()
    S = inputs.layout.total_tokens
    shape = f"B=1 H={HEADS} S={S} D={DIM}"
    for selection in SELECTIONS:
        config, memory = forced(0.25, selection), LayerState(0, "cond", 0)
        ms, density = _whole_call(bench, config, inputs)
        plan = svg2.plan(q, k, v, config, memory, inputs.layout)
        sorted_k, sorted_v = _sorted(plan, k, v)
        centroids = dict(memory.cache)
        parts = {
            "attention": lambda: _block_sparse(plan, q, sorted_k, sorted_v),
            "plan": lambda: svg2.plan(q, k, v, config, memory, inputs.layout),
            "kmeans_q": lambda: kmeans(q, centroids["q_centroids"], 2),
            "kmeans_k": lambda: kmeans(k, centroids["k_centroids"], 2),
            "gather_kv": lambda: _sorted(plan, k, v),
        }
        times = {name: median_ms(part) for name, part in parts.items()}
        prefix = _call_key(config, S)
        about = {"density": density, "inputs": inputs.description, "baseline": f"whole call {ms:.2f} ms"}
        bench.note(f"{prefix}/overhead_share", 1 - times["attention"] / ms, "of the call", shape, **about)
        for name, time in times.items():
            bench.note(f"{prefix}/{name}_ms", time, "ms", shape, **about)


def _call_key(config: MethodConfig, tokens: int) -> str:
    if isinstance(config, SpargeConfig):
        return sparge.call_key(config, tokens)
    precision = config.to_dict()["precision"].replace("native", "bf16").replace("-", "_")
    clusters = "/clusters" if getattr(config, "selection", "") == "clusters" else ""
    return f"{config.method}/{precision}/S{tokens}/density0.25{clusters}"


def _whole_call(bench: Bench, config: MethodConfig, inputs: Inputs) -> tuple[float, float]:
    """Times `attend` against dense cuDNN; returns its milliseconds and density."""
    state = RunState(config, num_layers=1)
    state.begin_forward(0, 1, "cond", inputs.layout)
    ms = median_ms(lambda: attend(inputs.q, inputs.k, inputs.v, state, 0))
    density = state.records[-1].density.mean().item()
    q, k, v = inputs.heads_first()
    dense = median_ms(lambda: dense_attention(q, k, v, backend="cudnn"), 5)
    S = inputs.layout.total_tokens
    key = _call_key(config, S)
    shape = f"B=1 H={q.shape[1]} S={S} D={q.shape[-1]}"
    about = {"density": density, "inputs": inputs.description, "baseline": f"cuDNN dense {dense:.2f} ms"}
    bench.note(f"{key}/ms", ms, "ms", shape, **about)
    bench.note(f"{key}/speedup_vs_cudnn", dense / ms, "x", shape, **about)
    return ms, density


def bench_quantised(bench: Bench) -> None:
    """8-bit attention: dense, block-sparse on SVG2's plans, and the whole SVG2 call."""
    quantised.bench_dense(bench, WAN_720P.total_tokens, HEADS, DIM, f"S{WAN_720P.total_tokens}")
    quantised.bench_dense(bench, 45_106, HEADS, 64, "d64/S45106")
    inputs = bench.inputs(WAN_720P, HEADS)
    for density in (0.10, 0.25, 0.50):
        plan = cluster_plan(inputs, density)
        quantised.bench_sparse(bench, plan, *inputs.heads_first(), density, inputs.description)
    _whole_call(bench, forced(0.25, precision="int8-fp8"), inputs)


def bench_sparge(bench: Bench) -> None:
    """The whole SpargeAttn call, its parts and its filter of P V."""
    sparge.bench_calls(bench, bench.inputs(WAN_720P, HEADS), _whole_call, recall)


def bench_scale(bench: Bench) -> None:
    """The whole SVG2 call at growing numbers of tokens: time and memory."""
    scale_of(bench, lambda selection: forced(0.25, selection), HEADS, DIM)


def bench_step(bench: Bench) -> None:
    """The fused elementwise passes at Wan 14B's width."""
    bench_elementwise(bench, WAN_720P.total_tokens, DEVICE)


def bench_linears(bench: Bench) -> None:
    """Linears in 8 bits, with the quantisation of their input."""
    linears_of(bench, WAN_720P.total_tokens, DEVICE)


def bench_layers(bench: Bench) -> None:
    """One full-width layer of Wan 14B and of HunyuanVideo at 720p, in 16 and 8 bits."""
    try:
        import diffusers  # noqa: F401
    except ImportError:
        return bench.say("layers are left out: they are Diffusers', and the package diffusers is missing")
    layers_of(bench, {"wan14b_720p": WAN_720P, "hunyuan_720p": HUNYUAN_720P})


def bench_training(bench: Bench) -> None:
    """8-bit attention with gradients: forward and backward."""
    with torch.inference_mode(False), torch.enable_grad():
        training.bench_shape(bench, TRAINING_TOKENS, HEADS, DIM, f"S{TRAINING_TOKENS}", sweep=bench.sweep)
        training.bench_shape(bench, TRAINING_TOKENS, HEADS, 64, f"d64/S{TRAINING_TOKENS}")
        training.bench_shape(bench, TRAINING_TOKENS, HEADS, DIM, f"causal/S{TRAINING_TOKENS}", is_causal=True)


SECTIONS: dict[str, Callable[[Bench], None]] = {
    "attention": bench_attention,
    "whole-blocks": bench_whole_blocks,
    "kmeans": bench_kmeans,
    "permute": bench_permute,
    "near": bench_near,
    "svg1": bench_svg1,
    "svg2": bench_svg2,
    "quantised": bench_quantised,
    "sparge": bench_sparge,
    "training": bench_training,
    "scale": bench_scale,
    "step": bench_step,
    "linears": bench_linears,
    "layers": bench_layers,
}


def gpu_name() -> str:
    """The current GPU's name."""
    return torch.cuda.get_device_name()
