"""k-means of tokens, the orders it gives, and moving tokens into them."""
