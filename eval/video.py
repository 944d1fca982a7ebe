"""Frames in and out of video files, through the ffmpeg that imageio-ffmpeg ships.

Frames are uint8 [F, H, W, 3], RGB, full range. Files are h264 in mp4, yuv420p, BT.709, tagged as such, so that players
show the colours that were written. A 4:2:0 picture has even sides: an odd side is repeated once and read back even.
"""

import importlib.util
import math
import os
import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from .files import atomic_path

_BT709 = ["-vf", "scale=out_color_matrix=bt709:out_range=tv", "-colorspace", "bt709", "-color_primaries", "bt709",
          "-color_trc", "bt709", "-color_range", "tv"]  # fmt: skip
_STREAM = re.compile(
    r"Stream #.*Video: .*?, (?P<pixels>[a-z0-9]+)[(,].*?(?:, (?P<fps>[\d.]+k?) fps(?:, (?P<tbr>[\d.]+k?) tbr)?|$)",
    re.MULTILINE,
)
_ALPHA = re.compile(r"^(yuva|gbrap|rgba|argb|bgra|abgr|ya|pal8)")
_GREY = re.compile(r"^(gray|mono)")
# Containers and raw streams; none of them is a list of other files, as a playlist is.
_FORMATS = (
    "mov,matroska,webm,avi,yuv4mpegpipe,gif,mpegts,mpeg,mpegvideo,flv,ogg,nut,asf,h264,hevc,ivf,obu,mxf,m4v,"
    "apng,webp_pipe,rawvideo"
)
GAP = 4  # pixels between the two halves of a side-by-side picture
LABEL_HEIGHT = 20


class VideoError(ValueError):
    """A video file, or an array of frames, that cannot be used, and why."""


@dataclass(frozen=True)
class Video:
    """A video file that is decoded as it is iterated over, so that its length costs no memory.

    Attributes:
        path: the file.
        fps: frames per second written in its header, the mean if they vary.
        variable: whether the header says that they vary.
    """

    path: Path
    fps: float
    variable: bool = False

    def __iter__(self):
        """Yield every stored frame once, uint8 [H, W, 3], whatever its time stamp."""
        count = 0
        with tempfile.TemporaryFile() as log:
            picture = ["-map", "0:v:0", "-fps_mode", "passthrough", "-f", "image2pipe", "-c:v", "ppm", "-"]
            command = _ffmpeg(*_source(self.path), *picture)
            process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=log)
            assert process.stdout is not None  # it is a pipe
            try:
                while (frame := _read_ppm(process.stdout)) is not None:
                    count += 1
                    yield frame
                code = process.wait()
            finally:
                process.stdout.close()
                process.kill()
                process.wait()
            log.seek(0)
            message = log.read().decode(errors="replace").strip()
        if code or message or not count:
            reason = message.splitlines()[0] if message else "it holds no frame"
            raise VideoError(f"{self.path} is damaged: {count} frames were read, then: {reason}. Write the file again")


def open_video(path):
    """Look at a video's header without decoding it.

    Args:
        path: a file in any format ffmpeg reads, with RGB or YUV colour and no alpha.

    Returns:
        Video: iterate over it for the frames.

    Raises:
        FileNotFoundError: there is no such file.
        VideoError: the file is empty, is no video, is grey or has alpha.
    """
    path = Path(path)
    if not os.path.isfile(path):
        raise FileNotFoundError(f"no video at {path}")
    if not path.stat().st_size:
        raise VideoError(f"{path} is empty (0 bytes): write the file again")
    header = _run(_ffmpeg(*_source(path), level="info")).stderr.decode(errors="replace")
    stream = _STREAM.search(header)
    if stream is None:
        reason = header.strip().splitlines()[-1] if header.strip() else "no video stream"
        raise VideoError(f"{path} is not a video that ffmpeg can read: {reason}")
    _check_pixels(path, stream["pixels"])
    if stream["fps"] is None:
        raise VideoError(f"{path} states no frame rate: store it as mp4, for example with write_video")
    variable = stream["tbr"] is not None and stream["tbr"] != stream["fps"]
    return Video(path, float(stream["fps"].replace("k", "e3")), variable)


def read_video(path):
    """Read a whole video.

    Args:
        path: the file, see open_video.

    Returns:
        frames: uint8 [F, H, W, 3].
        fps: frames per second.

    Raises:
        FileNotFoundError, VideoError: as open_video, and for a file that breaks off.
    """
    video = open_video(path)
    return np.stack(list(video)), video.fps


def write_video(path, frames, fps):
    """Write frames as h264 mp4; the file appears under its name only when it is complete.

    Args:
        path: the file to write, in an existing folder.
        frames: uint8 [F, H, W, 3]; odd sides are made even by repeating the last row or column.
        fps: frames per second, above 0.

    Raises:
        VideoError: frames of another shape or type, or ffmpeg failed.
        ValueError: fps is not above 0.
    """
    frames = check_frames(frames)
    if not fps > 0:
        raise ValueError(f"fps must be above 0, got {fps}")
    frames = np.pad(frames, ((0, 0), (0, frames.shape[1] % 2), (0, frames.shape[2] % 2), (0, 0)), mode="edge")
    _, height, width, _ = frames.shape
    source = ["-f", "rawvideo", "-pix_fmt", "rgb24", "-s", f"{width}x{height}", "-r", str(fps), "-i", "-"]
    target = ["-c:v", "libx264", "-crf", "14", "-pix_fmt", "yuv420p", *_BT709, "-movflags", "+faststart", "-f", "mp4"]
    if not Path(path).parent.is_dir():
        raise VideoError(f"{path} could not be written: there is no folder {Path(path).parent}")
    with atomic_path(path) as partial:
        run = _run(_ffmpeg(*source, *target, "-y", _url(partial)), frames.tobytes())
        if run.returncode or run.stderr.strip():
            raise VideoError(f"{path} could not be written: {run.stderr.decode(errors='replace').strip()}")


def to_watch(frames, fps, height=480, seconds=4.0):
    """Make a small or short video one that a person can watch: whole-number enlargement, and the clip again and again.

    Args:
        frames: uint8 [F, H, W, 3].
        fps: frames per second it will be shown with.
        height: least height of the result, in pixels; each pixel becomes a square of so many that this is reached.
        seconds: least length of the result.

    Returns:
        uint8 [F', H', W', 3]; a video that is large and long enough comes back as it is.
    """
    scale = -(-height // frames.shape[1])
    times = max(1, math.ceil(seconds * fps / len(frames) - 1e-9))
    return np.tile(frames.repeat(scale, 1).repeat(scale, 2), (times, 1, 1, 1)) if scale * times > 1 else frames


def side_by_side(left, right, labels=None):
    """Put two videos next to each other.

    Args:
        left, right: uint8 [F, H, W, 3], the same shape.
        labels: two short texts written above the halves, or None.

    Returns:
        uint8 [F, H', 2 W + 4, 3].

    Raises:
        VideoError: frames of a wrong type, or two different shapes.
    """
    left, right = check_frames(left, "left"), check_frames(right, "right")
    if left.shape != right.shape:
        raise VideoError(f"left and right must have one shape, got {left.shape} and {right.shape}")
    count, height, width, _ = left.shape
    picture = np.concatenate([left, np.full((count, height, GAP, 3), 255, np.uint8), right], axis=2)
    if labels is None:
        return picture
    bar = np.broadcast_to(_label_bar(labels, width), (count, LABEL_HEIGHT, 2 * width + GAP, 3))
    return np.concatenate([bar, picture], axis=1)


def check_frames(frames, name="frames"):
    """Return `frames` as an array if it is uint8 [F, H, W, 3] with F, H, W >= 1, else raise VideoError saying why."""
    frames = np.asarray(frames)
    if frames.ndim == 3 or (frames.ndim == 4 and frames.shape[-1] in (1, 2, 4)):
        kind = {1: "grey", 2: "grey with alpha", 4: "RGB with alpha"}.get(frames.shape[-1], "grey or a single picture")
        raise VideoError(f"{name} must be RGB, [F, H, W, 3], got {frames.shape} ({kind}): convert it to RGB first")
    if frames.ndim != 4 or frames.shape[-1] != 3 or 0 in frames.shape:
        raise VideoError(f"{name} must be [F, H, W, 3] with at least one frame and one pixel, got shape {frames.shape}")
    if frames.dtype != np.uint8:
        raise VideoError(f"{name} must be uint8, got {frames.dtype}: from [0, 1] use (x * 255).round().astype('uint8')")
    return frames


def ffmpeg_is_there():
    """Return whether imageio-ffmpeg, whose ffmpeg reads and writes all videos, is installed; nothing is imported."""
    return importlib.util.find_spec("imageio_ffmpeg") is not None


def _ffmpeg(*arguments, level="error"):
    import imageio_ffmpeg

    return [imageio_ffmpeg.get_ffmpeg_exe(), "-hide_banner", "-nostats", "-v", level, *map(str, arguments)]


def _source(path):
    """Arguments for one plain file of pictures: no protocol but files, no format that names other files."""
    return ["-protocol_whitelist", "file", "-format_whitelist", _FORMATS, "-i", _url(path)]


def _url(path):
    """A path that ffmpeg can't take for a protocol or a flag, whatever is in its name."""
    return f"file:{os.path.abspath(path)}"


def _run(command, data=b""):
    return subprocess.run(command, input=data, capture_output=True, check=False)


def _read_ppm(stream):
    if stream.readline() != b"P6\n":
        return None
    width, height = map(int, stream.readline().split())
    stream.readline()  # the largest value, 255
    data = stream.read(width * height * 3)
    return np.frombuffer(data, np.uint8).reshape(height, width, 3) if len(data) == width * height * 3 else None


def _check_pixels(path, pixels):
    for pattern, kind in ((_ALPHA, "has an alpha channel or a palette"), (_GREY, "is grey")):
        if pattern.match(pixels):
            raise VideoError(f"{path} {kind} (pixel format {pixels}): convert it with ffmpeg -pix_fmt yuv420p")


def _label_bar(labels, width):
    from PIL import Image, ImageDraw, ImageFont

    bar = Image.new("RGB", (2 * width + GAP, LABEL_HEIGHT), "white")
    font = ImageFont.load_default(size=13)
    for index, label in enumerate(labels):
        ImageDraw.Draw(bar).text((index * (width + GAP) + 4, 2), label, fill="black", font=font)
    return np.asarray(bar)
