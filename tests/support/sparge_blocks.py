"""SpargeAttn's blocks as small as the videos of tests."""

import pytest

from svg.methods.sparge import plan as sparge


def sparge_blocks(queries, keys, autouse=True):
    """A fixture that cuts videos into blocks of so many queries and keys."""

    @pytest.fixture(autouse=autouse)
    def small_blocks(monkeypatch):
        monkeypatch.setattr(sparge, "Q_BLOCK", queries)
        monkeypatch.setattr(sparge, "K_BLOCK", keys)
        sparge.video_blocks.cache_clear()
        yield
        sparge.video_blocks.cache_clear()

    return small_blocks
