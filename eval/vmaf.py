"""VMAF through ffmpeg's libvmaf filter, fed with the very frames that the other metrics see."""

import json
import os
import subprocess
import tempfile
import threading
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

    Source: Netflix, VMAF v0.6.1 (the default model, made for 1080p seen from three times its height).
    """
    references, outputs = iter(reference), iter(output)
    first = next(references)
    height, width, _ = first.shape
    if min(height, width) < SMALLEST:
        raise VmafError(f"VMAF needs frames of at least {SMALLEST} x {SMALLEST} pixels, got {height} x {width}")
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "vmaf.json"
        _run(chain([first], references), outputs, (width, height), log)
        frames = json.loads(log.read_text())["frames"]
    return np.array([frame["metrics"]["vmaf"] for frame in frames], np.float64)


def _run(references, outputs, size, log):
    pipes = [os.pipe() for _ in range(2)]
    ends = [read for read, _ in pipes]
    # The filter takes the distorted video first.
    feeders = [_Feeder(write, frames) for (_, write), frames in zip(pipes, (outputs, references))]
    try:
        process = subprocess.Popen(
            _command(ends, size, log.name),
            cwd=log.parent,
            pass_fds=ends,
            stdin=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
        )
    finally:
        for end in ends:
            os.close(end)
        for feeder in feeders:
            feeder.start()
    message = process.communicate()[1].decode(errors="replace").strip()
    for feeder in feeders:
        feeder.finish()
    if process.returncode:
        reason = message.splitlines()[-1] if message else f"code {process.returncode}"
        if "No such filter" in message:
            reason = f"it was built without libvmaf; {_INSTALL}"
        raise VmafError(f"VMAF could not be taken, ffmpeg failed: {reason}")


def _command(ends, size, log):
    sources = []
    for end in ends:
        sources += ["-f", "rawvideo", "-pix_fmt", "rgb24", "-s", f"{size[0]}x{size[1]}", "-i", f"pipe:{end}"]
    graph = f"[0:v]{_TO_YUV}[d];[1:v]{_TO_YUV}[r];[d][r]libvmaf=model=version={MODEL}:log_fmt=json:log_path={log}"
    return [_executable(), "-hide_banner", "-nostats", "-v", "error", *sources, "-lavfi", graph, "-f", "null", "-"]


def _executable():
    try:
        import imageio_ffmpeg
    except ModuleNotFoundError as error:
        raise VmafError(f"VMAF needs ffmpeg with libvmaf: {_INSTALL}") from error
    return imageio_ffmpeg.get_ffmpeg_exe()


class _Feeder(threading.Thread):
    """Writes frames into a pipe that ffmpeg reads; two of them, for ffmpeg reads by turns."""

    def __init__(self, descriptor, frames):
        super().__init__(daemon=True)
        self._descriptor, self._frames = descriptor, frames
        self._error = None

    def run(self):
        try:
            with os.fdopen(self._descriptor, "wb") as pipe:
                for frame in self._frames:
                    pipe.write(np.ascontiguousarray(frame).data)
        except BrokenPipeError:  # ffmpeg has gone; its message says why
            return
        except (OSError, ValueError) as error:
            self._error = error

    def finish(self):
        self.join()
        if self._error:
            raise self._error
