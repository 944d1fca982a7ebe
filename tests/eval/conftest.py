import numpy as np
import pytest


def moving_clip(frames=9, height=48, width=64, noise=0.0, seed=0):
    """A smooth coloured wave that pans, uint8 [F, H, W, 3], with optional Gaussian noise (in grey levels)."""
    y, x = np.mgrid[:height, :width]
    waves = [128 + 90 * np.sin(x / (5 + c) + y / 9 + 0.5 * f) for f in range(frames) for c in range(3)]
    clip = np.stack(waves).reshape(frames, 3, height, width).transpose(0, 2, 3, 1)
    clip = clip + noise * np.random.default_rng(seed).standard_normal(clip.shape)
    return clip.round().clip(0, 255).astype(np.uint8)


@pytest.fixture
def clip():
    return moving_clip()


@pytest.fixture
def noisy():
    return moving_clip(noise=6.0)
