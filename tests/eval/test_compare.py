import json
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from svg.eval import metrics
from svg.eval.compare import compare, failures
from svg.eval.files import atomic_path, to_json, write_json
from svg.eval.names import METRICS
from svg.eval.video import Video, VideoError, open_video, write_video


def test_agrees_with_the_metrics_whatever_the_chunk(monkeypatch, clip, noisy):
    whole = compare(clip, noisy, "none")
    np.testing.assert_allclose(whole["psnr"]["per_frame"], metrics.psnr(clip, noisy))
    assert whole["psnr"]["mean"] == pytest.approx(metrics.psnr(clip, noisy).mean())
    assert whole["psnr"]["pooled"] == pytest.approx(metrics.psnr_from_error(metrics.squared_error(clip, noisy).mean()))
    assert (whole["frames"], whole["height"], whole["width"]) == (9, 48, 64)
    assert len(whole["ssim"]["per_frame"]) == 9 and len(whole["temporal_psnr"]["per_frame"]) == 8
    for size in (1, 2, 4):
        monkeypatch.setattr(metrics, "frames_a_pass", lambda height, width: size)
        assert_close(compare(clip, noisy, "none"), whole)


def assert_close(a, b):
    for metric in ("psnr", "ssim", "temporal_psnr"):
        np.testing.assert_allclose(a[metric]["per_frame"], b[metric]["per_frame"], rtol=1e-12)


def test_identical(clip):
    result = compare(clip, clip, "alex")
    assert result["psnr"]["mean"] == float("inf") and result["psnr"]["identical_frames"] == 9
    assert result["ssim"]["mean"] == pytest.approx(1, abs=1e-12)
    assert result["lpips"]["mean"] == 0 and result["lpips"]["net"] == "alex"
    assert json.loads(json.dumps(to_json(result), allow_nan=False))["psnr"]["mean"] == "inf"


def test_identical_frames_do_not_make_the_mean_infinite(clip, noisy):
    mixed = noisy.copy()
    mixed[:4] = clip[:4]
    result = compare(clip, mixed, "none")["psnr"]
    assert result["identical_frames"] == 4
    assert result["mean"] == pytest.approx(metrics.psnr(clip, noisy)[4:].mean())
    assert result["mean"] < result["pooled"] < float("inf")


def test_one_frame_has_no_changes(clip, noisy):
    result = compare(clip[:1], noisy[:1], "none")
    assert result["temporal_psnr"]["mean"] is None and "single frame" in result["temporal_psnr"]["note"]


def test_files_equal_arrays(tmp_path, clip, noisy):
    for name, frames in (("a", clip), ("b", noisy)):
        write_video(tmp_path / f"{name}.mp4", frames, fps=8)
    a, b = (open_video(tmp_path / f"{name}.mp4") for name in "ab")
    from_files = compare(a, b, "none")
    assert_close(from_files, compare(np.stack(list(a)), np.stack(list(b)), "none"))


def test_different_lengths_and_sizes(tmp_path, clip, noisy):
    with pytest.raises(VideoError, match="reference has 9 frames and output 5"):
        compare(clip, noisy[:5])
    with pytest.raises(VideoError, match="reference is 64 x 48 pixels .* and output 32 x 48"):
        compare(clip, noisy[:, :, :32])
    write_video(tmp_path / "a.mp4", clip, fps=8)
    with pytest.raises(VideoError, match="output ends after 5 frames and reference goes on"):
        compare(open_video(tmp_path / "a.mp4"), noisy[:5], "none")
    with pytest.raises(VideoError, match="reference ends after 5 frames and output goes on"):
        compare(noisy[:5], open_video(tmp_path / "a.mp4"), "none")


def test_unknown_net_and_wrong_type(clip):
    with pytest.raises(ValueError, match="lpips_net must be one of alex, vgg, none, got 'squeeze'"):
        compare(clip, clip, "squeeze")
    with pytest.raises(VideoError, match="output must be uint8"):
        compare(clip, clip / 255.0)


class Repeated(Video):
    """One frame, many times, decoded as slowly as it is asked for."""

    def __iter__(self):
        frame = np.zeros((64, 64, 3), np.uint8)
        return (frame for _ in range(self.fps))


def test_memory_does_not_grow_with_the_video():
    peaks = []
    for count in (40, 400):
        tracemalloc.start()
        compare(Repeated("x", count), Repeated("y", count), "none")
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 1.2 * peaks[0]


def test_json_refuses_nan_and_keeps_the_old_file(tmp_path):
    write_json(tmp_path / "a.json", {"x": [1.5, float("-inf"), None, True]})
    assert json.loads((tmp_path / "a.json").read_text()) == {"x": [1.5, "-inf", None, True]}
    with pytest.raises(ValueError, match="NaN"):
        write_json(tmp_path / "a.json", {"x": float("nan")})
    with pytest.raises(KeyboardInterrupt), atomic_path(tmp_path / "a.json") as partial:
        partial.write_text("half")
        raise KeyboardInterrupt
    assert json.loads((tmp_path / "a.json").read_text())["x"][0] == 1.5
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]


@pytest.mark.parametrize("name", ["squared_error", "difference_error", "ssim", "vmaf", "lpips"])
def test_a_metric_that_fails_is_a_note_and_the_others_stay(monkeypatch, clip, noisy, name):
    def broken(*args, **options):
        raise RuntimeError(f"no memory in {Path.home()} for\nthis")

    clip, noisy = (frames.repeat(2, 1).repeat(2, 2) for frames in (clip, noisy))
    if name == "vmaf":
        monkeypatch.setattr("svg.eval.compare.vmaf", broken)
    elif name == "lpips":
        monkeypatch.setattr(metrics.Lpips, "__call__", broken)
    else:
        monkeypatch.setattr(metrics, name, broken)
    result = compare(clip, noisy, "alex")
    key = {"squared_error": "psnr", "difference_error": "temporal_psnr"}.get(name, name)
    assert result[key]["mean"] is None and result[key]["note"] == "RuntimeError: no memory in ~ for this"
    assert failures(result) == [f"{key} was not measured: RuntimeError: no memory in ~ for this"]
    assert all(result[other]["mean"] is not None for other in set(METRICS) - {key})
    json.dumps(to_json(result), allow_nan=False)
