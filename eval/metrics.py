"""How close two videos are, frame by frame, on raw 8-bit RGB frames.

Every function takes two uint8 arrays [F, H, W, 3] of one shape and returns float64 [F]. Nothing is resized, re-encoded
or converted to another colour space.
"""

import numpy as np
import torch
import torch.nn.functional as F

from .lpips_weights import BACKBONES, load_lpips

PEAK = 255.0
SSIM_SIDE = 11
SSIM_SIGMA = 1.5
_PIXELS_A_PASS = 2**20


def frames_a_pass(height, width):
    """Return how many frames of this size are measured at a time, so that memory does not grow with the video."""
    return max(1, min(16, _PIXELS_A_PASS // (height * width)))


def squared_error(reference, output):
    """Return the mean squared error of each frame, float64 [F], on the 0 to 255 scale."""
    difference = reference.astype(np.int32) - output.astype(np.int32)
    return np.square(difference).mean(axis=(1, 2, 3), dtype=np.float64)


def psnr_from_error(error):
    """Return 10 log10(255^2 / error) in dB, infinite where the error is 0."""
    with np.errstate(divide="ignore"):
        return 10 * np.log10(PEAK**2 / np.asarray(error, np.float64))


def psnr(reference, output):
    """Return the peak signal-to-noise ratio of each frame, dB, infinite for identical frames.

    Args:
        reference, output: uint8 [F, H, W, 3].

    Returns:
        float64 [F].
    """
    return psnr_from_error(squared_error(reference, output))


def difference_error(reference, output):
    """Return the mean squared error of each frame-to-frame change, float64 [F - 1]: flicker that single frames hide.

    Args:
        reference, output: uint8 [F, H, W, 3].
    """
    change = np.diff(reference.astype(np.int32), axis=0) - np.diff(output.astype(np.int32), axis=0)
    return np.square(change).mean(axis=(1, 2, 3), dtype=np.float64)


def ssim(reference, output, device="cpu"):
    """Return the structural similarity of each frame: 11 x 11 Gaussian window, sigma 1.5, K1 0.01, K2 0.03, per channel.

    Args:
        reference, output: uint8 [F, H, W, 3], sides of at least 11 pixels.
        device: where to compute, in float64.

    Returns:
        float64 [F], mean over the three channels and all full windows; 1 for identical frames.

    Raises:
        ValueError: a side below 11 pixels.

    Source: Wang et al., Image Quality Assessment: From Error Visibility to Structural Similarity, 2004, section III.
    """
    if min(reference.shape[1:3]) < SSIM_SIDE:
        raise ValueError(f"SSIM needs frames of at least {SSIM_SIDE} x {SSIM_SIDE} pixels, got {_size(reference)}")
    x, y = _planes(reference, device), _planes(output, device)  # [3 F, 1, H, W]
    mean_x, mean_y = _blur(x), _blur(y)
    var_x, var_y = _blur(x * x) - mean_x**2, _blur(y * y) - mean_y**2
    cov = _blur(x * y) - mean_x * mean_y
    c1, c2 = (0.01 * PEAK) ** 2, (0.03 * PEAK) ** 2
    score = ((2 * mean_x * mean_y + c1) * (2 * cov + c2)) / ((mean_x**2 + mean_y**2 + c1) * (var_x + var_y + c2))
    return score.reshape(len(reference), -1).mean(dim=1).cpu().numpy()


class Lpips:
    """Learned perceptual distance with the published weights; 0 for identical frames, larger is further apart.

    Args:
        net: "alex" (the usual one) or "vgg".
        device: where to compute, in float32.

    Raises:
        LpipsWeightsError: the weights are not on this machine.

    Source: Zhang et al., The Unreasonable Effectiveness of Deep Features as a Perceptual Metric, 2018.
    """

    def __init__(self, net="alex", device="cpu"):
        self.net, self.device = net, device
        self._module = load_lpips(net, device)

    @torch.no_grad()
    def __call__(self, reference, output):
        """Return the distance of each pair of frames, float64 [F].

        Args:
            reference, output: uint8 [F, H, W, 3]; scaled to [-1, 1] here, which is what the network was trained on.

        Raises:
            ValueError: frames too small for the network.
        """
        smallest = BACKBONES[self.net].min_side
        if min(reference.shape[1:3]) < smallest:
            raise ValueError(
                f"LPIPS ({self.net}) needs frames of at least {smallest} x {smallest} pixels, got {_size(reference)}"
            )
        # TF32 convolutions, a GPU's default, keep 10 bits: the number would depend on the device.
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
            distance = self._module(self._scale(reference), self._scale(output))
        return distance.reshape(-1).double().cpu().numpy()

    def _scale(self, frames):
        pixels = torch.tensor(frames, device=self.device).permute(0, 3, 1, 2)
        return pixels.float() / 127.5 - 1


def _size(frames):
    return f"{frames.shape[1]} x {frames.shape[2]}"


def _planes(frames, device):
    pixels = torch.tensor(frames, device=device).permute(0, 3, 1, 2)
    return pixels.reshape(-1, 1, *frames.shape[1:3]).double()


def _blur(x):
    """Weighted mean over every full window, one axis after the other."""
    offsets = torch.arange(SSIM_SIDE, dtype=torch.float64, device=x.device) - SSIM_SIDE // 2
    weights = torch.exp(-(offsets**2) / (2 * SSIM_SIGMA**2))
    weights = weights / weights.sum()
    return F.conv2d(F.conv2d(x, weights.view(1, 1, -1, 1)), weights.view(1, 1, 1, -1))
