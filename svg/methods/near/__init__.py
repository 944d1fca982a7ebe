"""near: semantic granules, chosen by the error that their means would leave, means for all the rest.

From Sparse VideoGen2 it takes the semantic order (k-means of queries and keys), from SVG-EAR that what is left out
counts as its mean and that this error decides what is computed. Its own are granules of a fixed size instead of
clusters, the error of pooled queries instead of centroids, and one threshold for all heads of a layer instead of a share
of the attention mass for every row.
"""
