"""What several operations share: hardware, launches, tile lists, checks, smoothing, merging."""
