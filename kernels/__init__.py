"""How attention is computed: tensor-only operations, each a plain-torch reference beside its Triton kernel."""

if __name__ == "kernels":
    raise ImportError(
        "this folder was imported as top-level `kernels`, which is the name of Hugging Face's package: "
        "import `svg.kernels`, and run `pytest` rather than `python -m pytest` from the repository root"
    )

from .activations import activate, activate_reference
from .block_sparse.op import block_sparse_attention
from .block_sparse.reference import block_sparse_attention_reference
from .block_sparse_quantised.op import block_sparse_attention_quantised
from .block_sparse_quantised.reference import block_sparse_attention_quantised_reference
from .clustering.assign import kmeans_assign, kmeans_assign_reference
from .clustering.kmeans import Clustering, kmeans
from .clustering.means import cluster_means, cluster_means_reference, kmeans_update, kmeans_update_reference
from .clustering.neighbours import neighbour_order, neighbour_order_reference
from .clustering.permute import (
    gather_tokens,
    gather_tokens_reference,
    inverse_permutation,
    scatter_tokens,
    scatter_tokens_reference,
    sort_labels,
    sort_labels_reference,
)
from .dense_quantised.nvfp4 import fp4_attention, fp4_attention_reference
from .dense_quantised.op import quantised_attention
from .dense_quantised.reference import quantised_attention_reference
from .dense_quantised.varlen import varlen_attention, varlen_attention_reference
from .elementwise import (
    gate_residual,
    gate_residual_reference,
    modulate,
    modulate_reference,
    norm_rope,
    norm_rope_reference,
    residual_modulate,
    residual_modulate_reference,
)
from .linears import QuantizedRows, fp8_linear, fp8_linear_reference, quantize_rows, quantize_rows_reference
from .quantize.channels import quantize_channels, quantize_channels_reference, statistics, statistics_reference
from .quantize.nvfp4 import quantize_nvfp4, quantize_nvfp4_reference
from .quantize.tokens import quantize_tokens, quantize_tokens_reference
from .selection.probe import probe_attention, probe_attention_reference
from .selection.sparge import (
    BlockStatistics,
    block_statistics,
    block_statistics_reference,
    sparge_block_map,
    sparge_block_map_reference,
)
from .selection.top_p import top_p_block_map, top_p_block_map_reference
from .training.op import training_attention, training_attention_backward
from .training.reference import training_attention_backward_reference, training_attention_reference

__all__ = [
    "BlockStatistics",
    "Clustering",
    "QuantizedRows",
    "activate",
    "activate_reference",
    "block_sparse_attention",
    "block_sparse_attention_quantised",
    "block_sparse_attention_quantised_reference",
    "block_sparse_attention_reference",
    "block_statistics",
    "block_statistics_reference",
    "cluster_means",
    "cluster_means_reference",
    "fp4_attention",
    "fp4_attention_reference",
    "fp8_linear",
    "fp8_linear_reference",
    "gate_residual",
    "gate_residual_reference",
    "gather_tokens",
    "gather_tokens_reference",
    "inverse_permutation",
    "kmeans",
    "kmeans_assign",
    "kmeans_assign_reference",
    "kmeans_update",
    "kmeans_update_reference",
    "modulate",
    "modulate_reference",
    "neighbour_order",
    "neighbour_order_reference",
    "norm_rope",
    "norm_rope_reference",
    "probe_attention",
    "probe_attention_reference",
    "quantised_attention",
    "quantised_attention_reference",
    "quantize_channels",
    "quantize_channels_reference",
    "quantize_nvfp4",
    "quantize_nvfp4_reference",
    "quantize_rows",
    "quantize_rows_reference",
    "quantize_tokens",
    "quantize_tokens_reference",
    "residual_modulate",
    "residual_modulate_reference",
    "scatter_tokens",
    "scatter_tokens_reference",
    "sort_labels",
    "sort_labels_reference",
    "sparge_block_map",
    "sparge_block_map_reference",
    "statistics",
    "statistics_reference",
    "top_p_block_map",
    "top_p_block_map_reference",
    "training_attention",
    "training_attention_backward",
    "training_attention_backward_reference",
    "training_attention_reference",
    "varlen_attention",
    "varlen_attention_reference",
]
