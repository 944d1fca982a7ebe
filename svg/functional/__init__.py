"""Attention for any model, in the place of PyTorch's scaled_dot_product_attention."""
