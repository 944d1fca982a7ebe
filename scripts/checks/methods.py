"""Checks the methods as pipelines call them, on this machine's GPU: whole attention calls through `svg.attend`.

Each layout (text apart, first, last with padded prompts of two lengths) runs three steps of SVG1, SVG2 and SpargeAttn: no host sync is allowed
after the first call, two runs must agree bit for bit, density 1 must equal dense attention, and every sparse output is compared with
masked dense attention in fp64 built from the very plan that was executed.

    python scripts/checks/methods.py --out methods.json
"""

from __future__ import annotations

import argparse
import json
from contextlib import contextmanager
from pathlib import Path

import torch

from svg.attend import attend, dense_attention
from svg.config import SpargeConfig, SVG1Config, SVG2Config
from svg.engine.execute import execute
from svg.engine.layout import TokenLayout
from svg.engine.plan import Plan
from svg.engine.state import RunState
from svg.methods.dense import key_mask
from svg.methods.sparge import plan as sparge
from svg.methods.svg1 import plan as svg1
from svg.methods.svg2 import plan as svg2

PLAN = {"svg1": svg1.plan, "svg2": svg2.plan, "sparge": sparge.plan}
CONFIGS = (
    SVG1Config(density=0.4, block_size=64, warmup_steps=0, warmup_layers=0),
    SVG2Config(top_p=0.6, num_q_clusters=20, num_k_clusters=50, warmup_steps=0, warmup_layers=0),
    SpargeConfig(topk=0.4, simthresh=0.05, attention_sink=True, warmup_steps=0, warmup_layers=0),
    SVG1Config(head_density=[[0.3, 0.6, 0.4]], block_size=64, warmup_steps=0, warmup_layers=0),
    SVG2Config(head_top_p=[[0.3, 0.8, 0.6]], num_q_clusters=20, num_k_clusters=50, warmup_steps=0, warmup_layers=0),
)
FULL = (
    SVG1Config(density=1.0, warmup_steps=0, warmup_layers=0),
    SVG2Config(top_p=1.0, num_q_clusters=20, num_k_clusters=50, warmup_steps=0, warmup_layers=0),
    SpargeConfig(topk=1.0, warmup_steps=0, warmup_layers=0),
)
LAYOUTS = {
    "apart": TokenLayout(frames=5, height=15, width=21),
    "first": TokenLayout(frames=5, height=15, width=21, text_tokens=77, text_position="first"),
    "last": TokenLayout(frames=5, height=15, width=21, text_tokens=77, text_position="last"),
}


def structured(batch, heads, layout, dim, dtype, device, seed):
    """q, k, v [B, S, H, D] with what video has: features that vary slowly over space and time, plus noise."""
    generator = torch.Generator(device).manual_seed(seed)
    basis = torch.randn(3, heads, 8, dim, generator=generator, device=device)
    t, y, x = torch.meshgrid(*(torch.linspace(0, 3, n, device=device) for n in (layout.frames, layout.height, layout.width)),
                             indexing="ij")  # fmt: skip
    waves = torch.stack(
        [f(a * p.flatten()) for p in (t, y, x) for a, f in ((1.0, torch.sin), (2.0, torch.cos))][:6], -1
    )
    waves = torch.nn.functional.pad(waves, (0, 2), value=1.0)  # [V, 8]
    tensors = []
    for i in range(3):
        video = torch.einsum("vc,hcd->vhd", waves, basis[i]).expand(batch, -1, -1, -1)
        text = torch.randn(batch, layout.text_tokens, heads, dim, generator=generator, device=device)
        tokens = [text, video] if layout.text_position == "first" else [video, text]
        noise = torch.randn(batch, layout.total_tokens, heads, dim, generator=generator, device=device)
        tensors.append((torch.cat(tokens, 1) + 0.5 * noise).to(dtype))
    return tensors


def masked_dense(plan: Plan, q, k, v) -> torch.Tensor:
    """fp64 attention under the plan's map, token by token: [B, H, S, D]."""
    batch, heads, tokens, _ = q.shape
    out = torch.empty(q.shape, dtype=torch.float64, device=q.device)
    identity = torch.arange(tokens, device=q.device)
    for b in range(batch):
        for h in range(heads):
            m = plan.map_index[b, h]
            blocks = []
            for sizes, permutation in ((plan.q_sizes, plan.q_permutation), (plan.k_sizes, plan.k_permutation)):
                block = torch.repeat_interleave(torch.arange(sizes.shape[1], device=q.device), sizes[m])
                order = identity if permutation is None else permutation[b, h].long()
                blocks.append(torch.empty_like(block).scatter_(0, order, block))
            mask = plan.block_map[m][blocks[0]][:, blocks[1]]
            scores = q[b, h].double() @ k[b, h].double().T * q.shape[-1] ** -0.5
            out[b, h] = scores.masked_fill(~mask, -torch.inf).softmax(-1) @ v[b, h].double()
    return out


def run(config, layout, inputs, text_mask, steps=3) -> list[torch.Tensor]:
    state = RunState(config, 1)
    state.begin_run()
    outputs = []
    for step in range(steps):
        state.begin_forward(step, steps, "cond", layout)
        with syncs_forbidden(inputs[0].is_cuda and step > 0):
            outputs.append(attend(*inputs, state, 0, text_mask))
    state.end_run()
    return outputs


@contextmanager
def syncs_forbidden(on: bool):
    if on:
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        if on:
            torch.cuda.set_sync_debug_mode("default")


def relative(a, b) -> float:
    return ((a.double() - b.double()).norm() / b.double().norm()).item()


def check(name, layout, dtype, device, seed) -> list[dict]:
    inputs = structured(2, 3, layout, 64, dtype, device, seed)
    text_mask = None
    if name == "last":
        text_mask = torch.arange(layout.text_tokens, device=device) < torch.tensor([[13], [60]], device=device)
    q, k, v = (x.transpose(1, 2) for x in inputs)
    dense64 = dense_attention(*(x.double() for x in (q, k, v)), key_mask(layout, text_mask), "math")
    own_error = relative(dense_attention(q, k, v, key_mask(layout, text_mask)), dense64)
    allowed = 2 * own_error + 1e-5
    rows = [{"check": "dense", "measured": own_error, "allowed": 0.02, "ok": own_error < 0.02}]

    def note(label, measured, limit):
        rows.append({"check": label, "measured": measured, "allowed": limit, "ok": measured <= limit})

    for config in CONFIGS:
        name_of = f"{config.method}{' by head' if config.head_budgets(0) else ''}"
        first, second = run(config, layout, inputs, text_mask), run(config, layout, inputs, text_mask)
        note(f"{name_of} repeats", float(sum(int((a != b).sum()) for a, b in zip(first, second))), 0.0)
        state = RunState(config, 1)
        state.begin_run()
        state.begin_forward(0, 1, "cond", layout)
        plan = PLAN[config.method](q, k, v, config, state.layer(0), layout, text_mask)
        note(f"{name_of} against its plan", relative(execute(plan, q, k, v), masked_dense(plan, q, k, v)), allowed)
        density = plan.density()
        note(f"{name_of} density", density.max().item(), 0.95)
    for config in FULL:
        output = run(config, layout, inputs, text_mask, steps=1)[0].transpose(1, 2)
        note(f"{config.method} at full density against dense", relative(output, dense64), allowed)
    return [{"layout": name, "dtype": str(dtype), **row} for row in rows]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    rows = [
        row
        for name, layout in LAYOUTS.items()
        for dtype in (torch.bfloat16, torch.float16, torch.float32)
        for row in check(name, layout, dtype, args.device, args.seed)
    ]
    for row in rows:
        print(f"{'ok  ' if row['ok'] else 'FAIL'} {row['layout']:5} {row['dtype']:14} {row['check']:45} "
              f"{row['measured']:.3g} (allowed {row['allowed']:.3g})")  # fmt: skip
    if args.out:
        args.out.write_text(json.dumps(rows, indent=1) + "\n")
    raise SystemExit(0 if all(row["ok"] for row in rows) else 1)


if __name__ == "__main__":
    main()
