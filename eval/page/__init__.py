"""The report page: one HTML file beside the videos of a run or a sweep, which works from disk and offline."""

from .build import PAGE, build_page

__all__ = ["PAGE", "build_page"]
