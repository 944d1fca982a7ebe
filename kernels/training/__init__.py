"""INT8 attention for training: forward and backward."""
