"""VMAF through ffmpeg's libvmaf filter, fed with the very frames that the other metrics see."""

import json
import subprocess
import tempfile
from itertools import chain
from pathlib import Path

import numpy as np

MODEL = "vmaf_v0.6.1"
SMALLEST = 32  # libvmaf halves the picture four times and crashes on less than 17 pixels
_TO_YUV = "scale=out_color_matrix=bt709:out_range=tv,format=yuv420p"
_INSTALL = "pip install imageio-ffmpeg"


class VmafError(RuntimeError):
    """VMAF cannot be taken here, or of these frames, and why."""


def vmaf(reference, output):
    """Return the VMAF score of each frame.

    Args:
        reference, output: uint8 frames [H, W, 3] as an array [F, H, W, 3] or a Video, one size and one length.

    Returns:
        float64 [F], 0 to 100, larger is closer. Identical frames reach 97 to 100: the model never asks whether two
        frames are the same, and a frame without motion before it (the first) scores lower.

    Raises:
        VmafError: no ffmpeg with libvmaf, frames too small, or ffmpeg failed.
        ValueError: one video is longer than the other.

    Source: Netflix, VMAF v0.6.1 (the default model, made for 1080p seen from three times its height).
    """
    references, outputs = iter(reference), iter(output)
    first = next(references)
    height, width, _ = first.shape
    if min(height, width) < SMALLEST:
        raise VmafError(f"VMAF needs frames of at least {SMALLEST} x {SMALLEST} pixels, got {height} x {width}")
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "vmaf.json"
        _run(zip(chain([first], references), outputs, strict=True), (width, height), log)
        frames = json.loads(log.read_text())["frames"]
    return np.array([frame["metrics"]["vmaf"] for frame in frames], np.float64)


def _run(pairs, size, log):
    """Let ffmpeg measure pairs of frames, which reach it through its standard input, one above the other."""
    with tempfile.TemporaryFile() as messages:
        process = subprocess.Popen(
            _command(size, log.name), cwd=log.parent, stdin=subprocess.PIPE, stderr=messages, stdout=subprocess.DEVNULL
        )
        try:
            _feed(process.stdin, pairs)
            code = process.wait()
        finally:
            process.kill()
            process.wait()
        messages.seek(0)
        message = messages.read().decode(errors="replace").strip()
    if code:
        reason = message.splitlines()[-1] if message else f"code {code}"
        if "No such filter" in message:
            reason = f"it was built without libvmaf; {_INSTALL}"
        raise VmafError(f"VMAF could not be taken, ffmpeg failed: {reason}")


def _feed(pipe, pairs):
    try:
        with pipe:
            for reference, output in pairs:
                pipe.write(np.ascontiguousarray(reference).data)
                pipe.write(np.ascontiguousarray(output).data)
    except BrokenPipeError:  # ffmpeg has gone; its message says why
        return


def _command(size, log):
    width, height = size
    source = ["-f", "rawvideo", "-pix_fmt", "rgb24", "-s", f"{width}x{2 * height}", "-i", "-"]
    upper, lower = (f"crop={width}:{height}:0:{top}:exact=1,{_TO_YUV}" for top in (0, height))
    # The filter takes the distorted video first.
    graph = (
        f"[0:v]split[a][b];[a]{lower}[d];[b]{upper}[r];[d][r]libvmaf=model=version={MODEL}:log_fmt=json:log_path={log}"
    )
    return [_executable(), "-hide_banner", "-nostats", "-v", "error", *source, "-lavfi", graph, "-f", "null", "-"]


def _executable():
    try:
        import imageio_ffmpeg
    except ModuleNotFoundError as error:
        raise VmafError(f"VMAF needs ffmpeg with libvmaf: {_INSTALL}") from error
    return imageio_ffmpeg.get_ffmpeg_exe()
