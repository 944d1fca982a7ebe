"""What a tile may hold: recall of attention mass against tile use, for several orders of SVG2's clusters, from recorded q and k.

Every variant computes the same share of the map (--density) of the same tensors, so that recall can be compared. Tile use is
useful / computed pairs: along keys, runs of selected clusters padded to BLOCK_N keys; along queries, clusters padded to BLOCK_M
rows. Tiles are cut from the sorted tokens and pad nothing. Writes the table of docs/lab/kernels.md and, with --out, JSON.

    svg record "a red ball ..." --frames 33 --height 256 --width 256 --record-branches cond --out qkv.safetensors
    python scripts/bench/tile_use.py qkv.safetensors --q-clusters 36 --k-clusters 123
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch

from svg.engine.plan import Plan
from svg.kernels import kmeans, neighbour_order, top_p_block_map
from svg.kernels.clustering.means import cluster_means
from svg.recordings.record import open_recording
from svg.recordings.sweep import dense_rows, recall

BLOCKS_N = (32, 64, 128)
BLOCK_M = 128


def as_numbered(centroids):
    return torch.arange(centroids.shape[2], device=centroids.device).expand(centroids.shape[:3])


def principal(centroids):
    """Along the first principal component of the centroids."""
    centred = centroids - centroids.mean(2, keepdim=True)
    direction = torch.linalg.svd(centred, full_matrices=False).Vh[:, :, 0]  # [B, H, D]
    return (centred @ direction[..., None]).squeeze(-1).argsort(-1)


def median_split(centroids):
    """Halved at the median of the first principal component, each half again."""
    batch, heads, count, _ = centroids.shape
    order = torch.empty(batch, heads, count, dtype=torch.long, device=centroids.device)
    for b in range(batch):
        for h in range(heads):
            order[b, h] = torch.tensor(_halves(centroids[b, h], list(range(count))))
    return order


def _halves(points, members):
    if len(members) < 3:
        return members
    there = principal(points[members][None, None])[0, 0].tolist()
    ordered, middle = [members[i] for i in there], len(members) // 2
    return _halves(points, ordered[:middle]) + _halves(points, ordered[middle:])


ORDERS = {
    "as k-means numbers them": as_numbered,
    "first principal component": principal,
    "recursive median split": median_split,
    "greedy chain (`neighbour_order`, chosen)": neighbour_order,
}
TILES = (
    ("tiles of 128 x 64 in k-means order", (128, 64), as_numbered),
    ("tiles of 128 x 64, first principal component", (128, 64), principal),
    ('tiles of 128 x 64, greedy chain (`selection="tiles"`)', (128, 64), neighbour_order),
    ("tiles of 64 x 64, greedy chain", (64, 64), neighbour_order),
    ("tiles of 128 x 128, greedy chain", (128, 128), neighbour_order),
)


def sorted_clusters(x, count, iterations, order, seed=0):
    """k-means of x [B, H, S, D] whose clusters stand in an order, as svg2 makes them."""
    generator = torch.Generator(x.device).manual_seed(seed)
    tokens = torch.randperm(x.shape[2], generator=generator, device=x.device)[:count]
    centroids = kmeans(x, x[:, :, tokens].float(), iterations - 1).centroids
    centroids = centroids.gather(2, order(centroids).long()[..., None].expand_as(centroids))
    return kmeans(x, centroids, 1)


def tiles_of(x, found, tile):
    """(permutation, sizes, means) of stretches of `tile` tokens in cluster order."""
    starts = torch.arange(0, x.shape[2], tile, device=x.device)
    sizes = (x.shape[2] - starts).clamp_max(tile).to(torch.int32).expand(*x.shape[:2], -1)
    nothing = found.centroids.new_zeros(*sizes.shape, x.shape[3])
    return found.permutation, sizes, cluster_means(x, found.permutation, sizes, nothing)


def plan_of(q_side, k_side, density, dim):
    (q_order, q_sizes, q_means), (k_order, k_sizes, k_means) = q_side, k_side
    block_map = top_p_block_map(q_means, k_means, k_sizes, 1.0, 0.0, dim**-0.5, budget=density)
    batch, heads, tokens = q_order.shape
    index = torch.arange(batch * heads, dtype=torch.int32, device=q_order.device).view(batch, heads)
    visible = torch.full((batch * heads,), tokens, device=q_order.device)
    return Plan(
        q_permutation=q_order, k_permutation=k_order, q_sizes=q_sizes.flatten(0, 1), k_sizes=k_sizes.flatten(0, 1),
        block_map=block_map.flatten(0, 1), map_index=index, visible_keys=visible,
    )  # fmt: skip


def key_tile_use(plan, block_n):
    """Useful / computed pairs along keys: neighbouring selected clusters are one run, cut into tiles of block_n."""
    useful = computed = 0
    for block_map, q_sizes, k_sizes in zip(plan.block_map.cpu(), plan.q_sizes.tolist(), plan.k_sizes.tolist()):
        for row, rows in zip(block_map.tolist(), q_sizes):
            run = 0
            for selected, size in zip([*row, False], [*k_sizes, 0]):
                if selected:
                    run += size
                elif run:
                    useful += rows * run
                    computed += rows * -(-run // block_n) * block_n
                    run = 0
    return useful / computed


def query_tile_use(plan, block_m):
    sizes = plan.q_sizes
    return (sizes.sum() / ((sizes + block_m - 1) // block_m * block_m).sum()).item()


def variants(q, k, args):
    """(name, plan) of every row of the table."""
    dim = q.shape[-1]
    for name, order in ORDERS.items():
        sides = [
            sorted_clusters(x, count, args.iterations, order)
            for x, count in ((q, args.q_clusters), (k, args.k_clusters))
        ]
        yield f"clusters, {name}", plan_of(*((s.permutation, s.sizes, s.centroids) for s in sides), args.density, dim)
    for name, (q_tile, k_tile), order in TILES:
        sides = [
            tiles_of(x, sorted_clusters(x, count, args.iterations, order), tile)
            for x, count, tile in ((q, args.q_clusters, q_tile), (k, args.k_clusters, k_tile))
        ]
        yield name, plan_of(*sides, args.density, dim)


def measure(recording, call, args):
    q, k, v, text_mask = recording.tensors(call, args.device)
    if text_mask is not None or call.layout.text_tokens:
        raise SystemExit("tile_use.py reads recordings without text in the sequence, such as Wan's")
    _, lse = dense_rows(q, k, v, None)
    for name, plan in variants(q, k, args):
        row = {"name": name, "step": call.step, "layer": call.layer, "branch": call.branch}
        row |= {"density": plan.density().mean().item(), "recall": recall(plan, q, k, v, lse)}
        row |= {"key_tile_use": [key_tile_use(plan, n) for n in BLOCKS_N]}
        yield row | {"query_tile_use": query_tile_use(plan, BLOCK_M)}


def mean(values):
    values = list(values)
    return sum(values) / len(values)


def short(value):
    text = f"{value:.3f}"
    return text[1:] if text.startswith("0") else text


def print_table(rows):
    layers = sorted({row["layer"] for row in rows})
    print(
        f"| selection, order of clusters | recall, layers {' / '.join(map(str, layers))} | density | tile use, keys {' / '.join(map(str, BLOCKS_N))} | queries {BLOCK_M} |"
    )
    print("|---|---|---|---|---|")
    for name in dict.fromkeys(row["name"] for row in rows):
        own = [row for row in rows if row["name"] == name]
        recalls = [mean(mean(row["recall"]) for row in own if row["layer"] == layer) for layer in layers]
        keys = [mean(row["key_tile_use"][i] for row in own) for i in range(len(BLOCKS_N))]
        cells = (" / ".join(map(short, recalls)), short(mean(row["density"] for row in own)))
        print(
            f"| {name} | {cells[0]} | {cells[1]} | {' / '.join(f'{x:.2f}' for x in keys)} | {mean(row['query_tile_use'] for row in own):.2f} |"
        )


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("recording", type=Path)
    parser.add_argument("--q-clusters", type=int, default=100)
    parser.add_argument("--k-clusters", type=int, default=400)
    parser.add_argument("--iterations", type=int, default=20)
    parser.add_argument("--density", type=float, default=0.25)
    parser.add_argument("--layers", type=int, nargs="*", help="of the recorded ones [default: all]")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    recording = open_recording(args.recording)
    calls = [call for call in recording.calls if args.layers is None or call.layer in args.layers]
    rows = [row for call in calls for row in measure(recording, call, args)]
    tokens, source = calls[0].layout.total_tokens, recording.source
    print(
        f"{source.get('model')}, {tokens} tokens, {len(calls)} calls, {args.q_clusters} / {args.k_clusters} clusters\n"
    )
    print_table(rows)
    if args.out:
        settings = {name: str(value) if isinstance(value, Path) else value for name, value in vars(args).items()}
        args.out.write_text(json.dumps({"source": source, "settings": settings, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
