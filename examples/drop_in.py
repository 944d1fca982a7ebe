"""8-bit attention in the place of PyTorch's, in any model: here a plain transformer layer, patched for a block."""

from unittest.mock import patch

import torch
from torch.nn import functional

import svg

torch.manual_seed(0)
device = "cuda" if torch.cuda.is_available() else "cpu"
dtype = torch.bfloat16 if device == "cuda" else torch.float32
q, k, v = (torch.randn(1, 8, 1024, 64, device=device, dtype=dtype) for _ in range(3))

exact = functional.scaled_dot_product_attention(q, k, v)
with patch.object(functional, "scaled_dot_product_attention", svg.attention):
    rounded = functional.scaled_dot_product_attention(q, k, v, is_causal=False)

error = (rounded.float() - exact.float()).norm() / exact.float().norm()
print(f"8-bit attention on {device}: relative error {error:.4f}")
