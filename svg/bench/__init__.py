"""`svg bench`: what this GPU can do, our kernels, and the peers that are installed."""
