import subprocess

import imageio_ffmpeg
import numpy as np
import pytest

from svg.eval.metrics import psnr
from svg.eval.video import VideoError, open_video, read_video, side_by_side, write_video


def ffmpeg(*arguments):
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-hide_banner", "-v", "error", "-y", *map(str, arguments)]
    subprocess.run(command, check=True, stdin=subprocess.DEVNULL, capture_output=True)


def test_round_trip_keeps_size_rate_and_picture(tmp_path, clip):
    write_video(tmp_path / "a.mp4", clip, fps=16)
    frames, fps = read_video(tmp_path / "a.mp4")
    assert frames.shape == clip.shape and frames.dtype == np.uint8 and fps == 16
    assert psnr(clip, frames).min() > 33


def test_colours_survive(tmp_path):
    colours = np.array([[200, 30, 30], [20, 180, 60], [40, 50, 210], [230, 230, 20]], np.uint8)
    clip = np.broadcast_to(np.repeat(colours, 32, axis=0)[None, None], (3, 32, 128, 3))
    write_video(tmp_path / "a.mp4", clip, fps=8)
    frames, _ = read_video(tmp_path / "a.mp4")
    for i, colour in enumerate(colours):
        patch = frames[:, 8:24, 32 * i + 8 : 32 * i + 24].reshape(-1, 3).astype(int)
        assert np.abs(patch - colour).max() <= 4


def test_file_is_h264_yuv420p(tmp_path, clip):
    write_video(tmp_path / "a.mp4", clip, fps=8)
    meta = next(imageio_ffmpeg.read_frames(str(tmp_path / "a.mp4")))
    assert meta["codec"].startswith("h264") and meta["pix_fmt"].startswith("yuv420p")


def test_odd_sides_are_repeated_once(tmp_path, clip):
    write_video(tmp_path / "a.mp4", clip[:, :47, :63], fps=8)
    frames, _ = read_video(tmp_path / "a.mp4")
    assert frames.shape == (9, 48, 64, 3)
    assert psnr(clip[:, :47, :63], frames[:, :47, :63]).min() > 32


@pytest.mark.parametrize("fps", [8, 12.5, 23.976, 30])
def test_rate_and_count(tmp_path, clip, fps):
    write_video(tmp_path / "a.mp4", clip, fps=fps)
    video = open_video(tmp_path / "a.mp4")
    assert video.fps == pytest.approx(fps, abs=0.01) and len(list(video)) == 9


def test_variable_rate_gives_each_stored_frame_once(tmp_path, clip):
    write_video(tmp_path / "a.mp4", clip, fps=10)
    ffmpeg("-i", tmp_path / "a.mp4", "-vf", "setpts='if(gt(N,4),PTS*3,PTS)'", "-fps_mode", "vfr", tmp_path / "vfr.mp4")
    assert len(list(open_video(tmp_path / "vfr.mp4"))) == 9


def test_one_frame(tmp_path, clip):
    write_video(tmp_path / "a.mp4", clip[:1], fps=8)
    assert read_video(tmp_path / "a.mp4")[0].shape == (1, 48, 64, 3)


def test_failure_leaves_the_old_file_and_nothing_else(tmp_path, clip):
    write_video(tmp_path / "a.mp4", clip, fps=8)
    before = (tmp_path / "a.mp4").read_bytes()
    with pytest.raises(VideoError, match="could not be written"):
        write_video(tmp_path / "missing" / "a.mp4", clip, fps=8)
    with pytest.raises(ValueError, match="fps must be above 0"):
        write_video(tmp_path / "a.mp4", clip, fps=0)
    assert (tmp_path / "a.mp4").read_bytes() == before and [p.name for p in tmp_path.iterdir()] == ["a.mp4"]


def test_stopping_early_is_fine(tmp_path, clip):
    write_video(tmp_path / "a.mp4", clip, fps=8)
    frames = iter(open_video(tmp_path / "a.mp4"))
    assert next(frames).shape == (48, 64, 3)
    frames.close()


@pytest.mark.parametrize(
    "shape, dtype, words",
    [
        ((4, 32, 32), np.uint8, "grey or a single picture"),
        ((4, 32, 32, 1), np.uint8, "grey"),
        ((4, 32, 32, 4), np.uint8, "alpha"),
        ((0, 32, 32, 3), np.uint8, "at least one frame"),
        ((4, 32, 32, 3), np.float32, "must be uint8"),
    ],
)
def test_bad_frames(tmp_path, shape, dtype, words):
    with pytest.raises(VideoError, match=words):
        write_video(tmp_path / "a.mp4", np.zeros(shape, dtype), fps=8)
    assert not list(tmp_path.iterdir())


def test_missing_empty_and_nonsense_files(tmp_path):
    with pytest.raises(FileNotFoundError, match="no video at"):
        open_video(tmp_path / "a.mp4")
    (tmp_path / "empty.mp4").touch()
    with pytest.raises(VideoError, match="is empty"):
        open_video(tmp_path / "empty.mp4")
    (tmp_path / "text.mp4").write_text("not a video at all\n" * 50)
    with pytest.raises(VideoError, match="not a video"):
        open_video(tmp_path / "text.mp4")


@pytest.mark.parametrize("share", [0.3, 0.6, 0.9])
def test_truncated_file(tmp_path, clip, share):
    write_video(tmp_path / "a.mp4", clip, fps=8)
    data = (tmp_path / "a.mp4").read_bytes()
    (tmp_path / "cut.mp4").write_bytes(data[: int(share * len(data))])
    with pytest.raises(VideoError, match="cut.mp4 is"):
        read_video(tmp_path / "cut.mp4")


def test_damaged_bytes(tmp_path):
    clip = np.random.default_rng(0).integers(0, 255, (12, 64, 64, 3)).astype(np.uint8)
    write_video(tmp_path / "a.mp4", clip, fps=8)
    data = bytearray((tmp_path / "a.mp4").read_bytes())
    middle = len(data) // 2
    data[middle : middle + 4000] = bytes(4000)
    (tmp_path / "a.mp4").write_bytes(data)
    with pytest.raises(VideoError, match="is damaged"):
        read_video(tmp_path / "a.mp4")


@pytest.mark.parametrize("pixels, words", [("gray", "is grey"), ("rgba", "alpha"), ("pal8", "palette")])
def test_grey_and_alpha_files(tmp_path, clip, pixels, words):
    write_video(tmp_path / "a.mp4", clip, fps=8)
    target = "a.gif" if pixels == "pal8" else "b.mkv"
    codec = [] if pixels == "pal8" else ["-c:v", "ffv1" if pixels == "gray" else "png", "-pix_fmt", pixels]
    ffmpeg("-i", tmp_path / "a.mp4", *codec, tmp_path / target)
    if target == "a.gif":  # ffmpeg reads a gif as bgra
        words = "alpha"
    with pytest.raises(VideoError, match=words):
        open_video(tmp_path / target)


def test_sound_without_a_picture(tmp_path):
    ffmpeg("-f", "lavfi", "-i", "sine=duration=0.2", tmp_path / "a.wav")
    with pytest.raises(VideoError, match="not a video"):
        open_video(tmp_path / "a.wav")


def test_side_by_side(clip, noisy):
    pair = side_by_side(clip, noisy)
    assert pair.shape == (9, 48, 132, 3)
    assert (pair[:, :, :64] == clip).all() and (pair[:, :, 68:] == noisy).all()
    labelled = side_by_side(clip, noisy, ("dense", "svg2"))
    assert labelled.shape == (9, 68, 132, 3) and (labelled[:, 20:] == pair).all()
    assert (labelled[:, :20, :64] != 255).any() and (labelled[:, :20, 68:] != 255).any()
    with pytest.raises(VideoError, match="one shape"):
        side_by_side(clip, noisy[:5])
