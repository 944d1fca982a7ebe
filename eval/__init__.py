"""Frames in, numbers out: videos, metrics, comparison. Nothing here sees a video model."""
