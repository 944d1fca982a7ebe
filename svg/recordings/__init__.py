"""Recorded q, k, v of attention calls, and what is measured on them without generating a video."""
