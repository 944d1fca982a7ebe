import re
import subprocess

import imageio_ffmpeg
import numpy as np
import pytest
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from svg.eval import metrics
from svg.eval.video import read_video, write_video


def reference_ssim(a, b):
    return structural_similarity(
        a, b, channel_axis=-1, gaussian_weights=True, sigma=1.5, use_sample_covariance=False, data_range=255
    )


def test_psnr_equals_scikit_image(clip, noisy):
    expected = [peak_signal_noise_ratio(a, b, data_range=255) for a, b in zip(clip, noisy)]
    np.testing.assert_allclose(metrics.psnr(clip, noisy), expected, rtol=1e-12)


@pytest.mark.parametrize("height, width", [(48, 64), (11, 11), (33, 47)])
def test_ssim_equals_scikit_image(clip, noisy, height, width):
    a, b = clip[:, :height, :width], noisy[:, :height, :width]
    np.testing.assert_allclose(metrics.ssim(a, b), [reference_ssim(x, y) for x, y in zip(a, b)], atol=1e-9)


def test_ssim_on_flat_and_inverted_frames(clip):
    flat = np.full_like(clip, 7)
    for other in (255 - clip, flat):
        expected = [reference_ssim(x, y) for x, y in zip(clip, other)]
        np.testing.assert_allclose(metrics.ssim(clip, other), expected, atol=1e-9)


def test_identical_frames(clip):
    assert np.isinf(metrics.psnr(clip, clip)).all()
    np.testing.assert_allclose(metrics.ssim(clip, clip), 1.0, rtol=0, atol=1e-12)
    assert (metrics.difference_error(clip, clip) == 0).all()


def test_too_small_for_ssim(clip):
    with pytest.raises(ValueError, match="at least 11 x 11 pixels, got 10 x 64"):
        metrics.ssim(clip[:, :10], clip[:, :10])


def test_psnr_equals_ffmpeg_filter(tmp_path, clip, noisy):
    """Both measure one decoded clip: ffmpeg on its own planar RGB frames, we on the frames we read."""
    write_video(tmp_path / "a.mp4", clip, fps=8)
    write_video(tmp_path / "b.mp4", noisy, fps=8)
    log = tmp_path / "psnr.log"
    graph = f"[0:v]format=gbrp[a];[1:v]format=gbrp[b];[a][b]psnr=stats_file={log}"
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-v", "error", "-i", tmp_path / "a.mp4", "-i", tmp_path / "b.mp4"]
    subprocess.run([*command, "-lavfi", graph, "-f", "null", "-"], check=True, stdin=subprocess.DEVNULL)
    expected = [float(x) for x in re.findall(r"psnr_avg:([\d.]+)", log.read_text())]
    ours = metrics.psnr(read_video(tmp_path / "a.mp4")[0], read_video(tmp_path / "b.mp4")[0])
    assert len(expected) == 9
    np.testing.assert_allclose(ours, expected, rtol=0, atol=0.011)  # the filter prints two decimals


def test_difference_error_sees_flicker_that_psnr_does_not(clip):
    clip = np.clip(clip, 10, 245)
    steady = clip + np.uint8(5)
    flicker = clip.copy()
    flicker[0::2] += np.uint8(5)
    flicker[1::2] -= np.uint8(5)
    np.testing.assert_allclose(metrics.psnr(clip, steady), metrics.psnr(clip, flicker))
    assert (metrics.difference_error(clip, steady) == 0).all()
    np.testing.assert_allclose(metrics.difference_error(clip, flicker), 100.0)


def test_frames_a_pass():
    assert metrics.frames_a_pass(32, 32) == 16
    assert metrics.frames_a_pass(720, 1280) == 1
    assert metrics.frames_a_pass(2160, 3840) == 1
