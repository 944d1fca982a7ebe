"""Rules of selection compared on recorded calls by the error of the output, simulated with whole score matrices.

    svg record "PROMPT" --frames 33 --height 256 --width 256 --steps 20 --record-steps 5,10,17 --record-layers 0,2,4,6 --out qkv.safetensors
    python scripts/bench/selection_rules.py qkv.safetensors --out rules.json --device cuda

One change a row from the rule that `near` follows: how keys are ordered and cut into granules, how queries are grouped, what
a granule's error is estimated by and from how many queries, what the estimate is compared with, and what stands for the
rest. `exact` and `tail` are shares of the pairs; the error is relative l2 a head. Beside them the published rule, and an
oracle that knows the true error. Needs S x S scores of all heads: a GPU for more than some 2,000 tokens.
"""

from __future__ import annotations

import argparse
import json
import math
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from svg.kernels.clustering.kmeans import kmeans
from svg.kernels.clustering.neighbours import neighbour_order
from svg.methods.video_order import video_order
from svg.recordings.record import open_recording


@dataclass(frozen=True)
class Rule:
    """One way to decide what is computed; the defaults are those of `near`.

    Args:
        total: share of the pairs, exact ones and means together.
        size, rows: keys of a granule, and query rows of a list.
        keys, queries: order before cutting: "clusters" (a curve inside a cluster), "plain" (as sorted), "hilbert", "raster".
        key_tokens, query_tokens: tokens of a cluster on average.
        estimate: "mass", "centroid mass", "square" (of the mass), "error" (spread the same in all channels), "channels"
            (spread of each channel), "linear" (in the spread), or "true".
        pool, every: queries whose mean stands for them, or of which one stands for all.
        threshold: "rows" (the same number for every row group), "head", "layer", or "mass" (top-p without a tail).
        floor: share of the mean number that every row group gets.
        tail: "mean", "none", or "spread" (means weighed by the spread of their logits).
        top_p: mass kept by "mass".
    """

    total: float = 0.25
    size: int = 16
    rows: int = 128
    keys: str = "clusters"
    queries: str = "clusters"
    key_tokens: int = 64
    query_tokens: int = 256
    estimate: str = "error"
    pool: int = 4
    every: int = 1
    threshold: str = "layer"
    floor: float = 0.25
    tail: str = "mean"
    top_p: float = 0.6


NEAR = Rule()
ALONE = Rule(threshold="rows", pool=1)  # what single choices were measured against first
RULES = {
    "near": NEAR,
    **{f"total {total}": replace(NEAR, total=total) for total in (0.15, 0.35)},
    **{f"granules of {size}": replace(NEAR, size=size) for size in (8, 32, 64)},
    **{f"lists for {rows} rows": replace(NEAR, rows=rows) for rows in (32, 64, 256)},
    **{f"keys by {order}": replace(NEAR, keys=order) for order in ("plain", "hilbert", "raster")},
    **{f"queries by {order}": replace(NEAR, queries=order) for order in ("plain", "hilbert", "raster")},
    **{f"key clusters of {n}": replace(NEAR, key_tokens=n) for n in (16, 32, 128, 256)},
    **{f"query clusters of {n}": replace(NEAR, query_tokens=n) for n in (64, 128, 512)},
    **{
        f"estimate: {name}": replace(NEAR, estimate=name)
        for name in ("centroid mass", "mass", "square", "channels", "linear")
    },
    **{f"pools of {n}": replace(NEAR, pool=n) for n in (1, 2, 8, 16)},
    **{f"one query in {n}": replace(NEAR, pool=1, every=n) for n in (4, 8, 16)},
    "one threshold a head": replace(NEAR, threshold="head"),
    "equal rows": replace(NEAR, threshold="rows"),
    "no floor": replace(NEAR, floor=0.0),
    "floor .5": replace(NEAR, floor=0.5),
    "means weighed by spread": replace(NEAR, tail="spread"),
    "no means": replace(NEAR, tail="none"),
    "the true error": replace(NEAR, estimate="true"),
    "equal rows, the true error": replace(ALONE, estimate="true"),
    "top-p, no means (published)": Rule(threshold="mass", tail="none", estimate="centroid mass", size=64),
}


class Call:
    """Queries, keys and values [H, S, D] of a call in a rule's orders, with the granules' moments."""

    def __init__(self, q: Tensor, k: Tensor, v: Tensor, curve: Tensor, rule: Rule):
        S, D = q.shape[1:]
        k_order = _order(k, rule.keys, rule.key_tokens, curve)
        self.q_order = _order(q, rule.queries, rule.query_tokens, curve)
        self.q, k, v = _take(q, self.q_order), _take(k, k_order), _take(v, k_order)
        self.C = math.ceil(S / rule.size)
        self.padding = self.C * rule.size - S
        self.k, self.v = (torch.nn.functional.pad(x, (0, 0, 0, self.padding)) for x in (k, v))
        self.number = torch.full((self.C,), float(rule.size), device=q.device)
        self.number[-1] -= self.padding
        (self.k_mean, k_spread), (self.v_mean, v_spread) = (self._moments(x, rule.size) for x in (self.k, self.v))
        self.k_spread = k_spread
        self.weight = self.v_mean.square().sum(-1) + v_spread.sum(-1)
        self.scale = D**-0.5

    def _moments(self, x: Tensor, size: int) -> tuple[Tensor, Tensor]:
        parts = x.unflatten(1, (self.C, size))
        mean = parts.sum(2) / self.number[:, None]
        return mean, ((parts**2).sum(2) / self.number[:, None] - mean**2).clamp_min(0)


def _take(x: Tensor, order: Tensor) -> Tensor:
    return x.gather(1, order[..., None].expand_as(x))


def _order(x: Tensor, how: str, cluster_tokens: int, curve: Tensor) -> Tensor:
    H, S, _ = x.shape
    if how == "raster":
        return torch.arange(S, device=x.device).expand(H, S)
    if how == "hilbert":
        return curve.expand(H, S)
    clusters = math.ceil(S / cluster_tokens)
    generator = torch.Generator(x.device).manual_seed(0)
    start = x[None, :, torch.randperm(S, generator=generator, device=x.device)[:clusters]].float()
    start = kmeans(x[None], start, 19).centroids
    start = start.gather(2, neighbour_order(start).long()[..., None].expand_as(start))
    labels = kmeans(x[None], start, 1).labels[0].long()
    if how == "plain":
        return labels.argsort(dim=1, stable=True)
    return curve[labels[:, curve].argsort(dim=1, stable=True)]


def estimate(call: Call, rule: Rule, lse: Tensor) -> Tensor:
    """The score of every row group and granule, for each key of the granule: [H, groups, C]."""
    out = []
    for first in range(0, call.q.shape[1], rule.rows):
        rows = call.q[:, first : first + rule.rows]
        if rule.estimate == "true":
            out.append(_true_error(call, rows, lse[:, first : first + rule.rows], rule.size))
            continue
        rows = rows.mean(1, keepdim=True) if rule.estimate == "centroid mass" else _few(rows, rule)
        p = (call.scale * rows @ call.k_mean.mT + call.number.log()).softmax(-1)
        score = p if "mass" in rule.estimate else p.square()
        if rule.estimate in ("error", "linear", "channels"):
            if rule.estimate == "channels":
                spread = call.scale**2 * rows.square() @ call.k_spread.mT
            else:
                spread = call.scale**2 * rows.square().sum(-1, keepdim=True) * call.k_spread.mean(-1)[:, None]
            score = score * (spread if rule.estimate == "linear" else spread.clamp_max(6).expm1())
            score = score * call.weight[:, None]
        out.append((score / call.number).mean(1))
    return torch.stack(out, 1)


def _few(rows: Tensor, rule: Rule) -> Tensor:
    if rule.every > 1:
        return rows[:, rule.every // 2 :: rule.every] if rows.shape[1] > rule.every // 2 else rows[:, :1]
    return torch.stack([part.mean(1) for part in rows.split(rule.pool, dim=1)], 1)


def _true_error(call: Call, rows: Tensor, lse: Tensor, size: int) -> Tensor:
    p = (call.scale * rows @ call.k.mT - lse[..., None]).exp()
    if call.padding:
        p[..., -call.padding :] = 0
    exact = torch.einsum("hrcg,hcgd->hrcd", p.unflatten(2, (call.C, size)), call.v.unflatten(1, (call.C, size)))
    mean = (call.scale * rows @ call.k_mean.mT + call.number.log() - lse[..., None]).exp()
    return (exact - mean[..., None] * call.v_mean[:, None]).square().sum(-1).mean(1) / call.number


def select(scores: Tensor, call: Call, rule: Rule) -> Tensor:
    """Which granules every row group computes: bool [H, groups, C]."""
    H, groups, C = scores.shape
    if rule.threshold == "mass":
        mass, order = (scores * call.number).sort(-1, descending=True)
        keep = mass.cumsum(-1) - mass <= rule.top_p * mass.sum(-1, keepdim=True)
        return torch.zeros_like(keep).scatter_(-1, order, keep)
    each = max(1, round((rule.total - (rule.tail != "none") / rule.size) * C))
    least = each if rule.threshold == "rows" else max(1, round(rule.floor * each))
    chosen = torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, scores.topk(least, -1).indices, True)
    if rule.threshold == "rows":
        return chosen
    rest = (
        scores.masked_fill(chosen, -1.0).view(1, -1)
        if rule.threshold == "layer"
        else scores.masked_fill(chosen, -1.0).flatten(1)
    )
    best = rest.topk((each - least) * groups * (H if rule.threshold == "layer" else 1), -1).indices
    return chosen | torch.zeros_like(rest, dtype=torch.bool).scatter_(-1, best, True).view_as(chosen)


def output(call: Call, chosen: Tensor, rule: Rule) -> Tensor:
    """Attention in the queries' sorted order, [H, S, D]."""
    out = []
    for group, first in enumerate(range(0, call.q.shape[1], rule.rows)):
        rows, kept = call.q[:, first : first + rule.rows], chosen[:, group][:, None]
        exact = (call.scale * rows @ call.k.mT).unflatten(2, (call.C, rule.size))
        exact = exact.masked_fill(~kept[..., None], -torch.inf).flatten(2)
        if call.padding:
            exact[..., -call.padding :] = -torch.inf
        mean = call.scale * rows @ call.k_mean.mT + call.number.log()
        if rule.tail == "spread":
            spread = rows.square().sum(-1, keepdim=True) * call.k_spread.mean(-1)[:, None] * call.scale**2 / 2
            mean = mean + spread.clamp_max(math.log(rule.size))
        mean = mean.masked_fill(kept, -torch.inf) if rule.tail != "none" else torch.full_like(mean, -torch.inf)
        p = torch.cat([exact, mean], -1).softmax(-1)
        out.append(p @ torch.cat([call.v, call.v_mean], 1))
    return torch.cat(out, 1)


def dense(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Exact attention and its log-sum-exps."""
    out, sums = [], []
    for rows in q.split(1024, dim=1):
        logits = rows @ k.mT * q.shape[-1] ** -0.5
        sums.append(logits.logsumexp(-1))
        out.append((logits - sums[-1][..., None]).exp() @ v)
    return torch.cat(out, 1), torch.cat(sums, 1)


def measure(recording, rules: dict[str, Rule], device: str) -> dict[str, dict]:
    """Every rule's errors and densities over the calls of a recording."""
    found = {
        name: {"errors": [], "exact": [], "tail": 0.0 if rule.tail == "none" else 1 / rule.size}
        for name, rule in rules.items()
    }
    for recorded in recording.calls:
        q, k, v, _ = (None if x is None else x[0].float() for x in recording.tensors(recorded, device))
        if recorded.layout.text_tokens:
            raise SystemExit("selection_rules.py needs recordings without text in the sequence")
        curve = video_order(recorded.layout, "hilbert").to(device)
        exact, lse = dense(q, k, v)
        for name, rule in rules.items():
            call = Call(q, k, v, curve, rule)
            chosen = select(estimate(call, rule, lse.gather(1, call.q_order)), call, rule)
            wanted = _take(exact, call.q_order)
            error = (output(call, chosen, rule) - wanted).square().sum((1, 2)) / wanted.square().sum((1, 2))
            found[name]["errors"].append(error.sqrt().tolist())
            found[name]["exact"].append(chosen.float().mean().item())
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("recording", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--rules", nargs="+", choices=RULES, default=list(RULES), metavar="RULE")
    args = parser.parse_args()
    found = measure(open_recording(args.recording), {name: RULES[name] for name in args.rules}, args.device)
    for name, row in found.items():
        errors, exact = torch.tensor(row["errors"]), torch.tensor(row["exact"]).mean().item()
        print(
            f"{name:32s} error {errors.mean():.4f}, worst head {errors.max():.3f}; exact {exact:.3f}, tail {row['tail']:.3f}"
        )
    args.out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
