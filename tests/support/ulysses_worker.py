"""One rank of a context-parallel run of tiny transformers over gloo; rank 0 writes what all of them give.

RANK=0 WORLD_SIZE=2 MASTER_ADDR=localhost MASTER_PORT=29500 python ulysses_worker.py OUT.pt
"""

import sys

import torch
import torch.distributed as dist
from tiny_transformers import FAMILIES

import svg
from svg.config import DenseConfig, NearConfig, Sage2Config, SpargeConfig, SVG1Config, SVG2Config
from svg.methods.sparge import plan as sparge
from svg.pipelines.attach import attached
from svg.pipelines.processes import join, split_sequence

PARALLEL = ("wan", "hunyuan_video", "minimax_h3", "ltx", "ltx2", "ltx2_3", "chronoedit")
WARMUP = dict(warmup_steps=0.25, warmup_layers=0.0)
METHODS = {
    "dense": DenseConfig(),
    "svg1": SVG1Config(density=0.5, block_size=4, sample_rows=8, **WARMUP),
    "svg2": SVG2Config(top_p=0.4, num_q_clusters=4, num_k_clusters=6, first_iterations=5, **WARMUP),
    "sparge": SpargeConfig(topk=0.4, **WARMUP),
    "sage2": Sage2Config(**WARMUP),
    "near": NearConfig(budget=1.0, granule=8, rows=64, **WARMUP),
    # Clusters of random queries are so alike that their order turns on the last bit, in one process too.
    "near_residual": NearConfig(
        budget=0.5, granule=8, rows=16, cluster_tokens=16, query_order="hilbert", residual=1.0, **WARMUP
    ),
    "near_sparse": NearConfig(budget=0.5, granule=8, rows=64, cluster_tokens=16, query_order="hilbert", **WARMUP),
}
SIZE = (7, 6, 10)  # 105 tokens (patch 1 x 2 x 2): odd, and 3 heads


def outputs(name, config, degree=1):
    """Three steps of two branches, and the densities of every layer by step, branch and head."""
    torch.manual_seed(len(name))
    family = FAMILIES[name]
    transformer = family.make().eval()
    inputs = family.inputs(1, *SIZE)
    if name.startswith(
        "ltx"
    ):  # Diffusers repeats the text's mask for all heads, and a rank of its own code has not all
        inputs |= {key: None for key in inputs if key.endswith("encoder_attention_mask")}
    if degree > 1:
        split_sequence(transformer)
    svg.accelerate(transformer, config)
    found = []
    for step in range(3):
        for branch in ("cond", "uncond"):
            with torch.no_grad(), transformer.cache_context(branch, step_index=step, num_inference_steps=4):
                found.append(transformer(**inputs, return_dict=False)[0])
    records = attached(transformer)["transformer"].state.records
    return torch.stack(found), [record.density.mean(0) for record in records]


def main(path):
    sparge.Q_BLOCK, sparge.K_BLOCK = 6, 3
    join("cpu")
    degree = dist.get_world_size()
    results = {}
    for name in PARALLEL:
        for method, config in METHODS.items():
            out, densities = outputs(name, config, degree)
            results[name, method] = out, densities
    if dist.get_rank() == 0:
        torch.save(results, path)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1])
