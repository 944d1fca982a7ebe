"""`svg sweep`: a grid of generations, journalled, on one machine or a Ray cluster; and sweeps over recorded q, k, v."""
