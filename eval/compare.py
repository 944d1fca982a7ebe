"""One video against another: every metric, streamed, as a plain dict for report.json."""

from itertools import zip_longest

import numpy as np

from svg.environment import anonymous

from . import metrics
from .names import LPIPS_NETS, METRICS
from .video import Video, VideoError, check_frames
from .vmaf import vmaf

_NOT_ASKED = "not asked for"


def compare(reference, output, lpips_net="alex", device="cpu"):
    """Measure how close `output` is to `reference` on raw frames.

    Args:
        reference, output: uint8 [F, H, W, 3], or a Video, which is decoded as it is measured.
        lpips_net: "alex", "vgg" or "none".
        device: where SSIM and LPIPS are computed.

    Returns:
        dict with `frames`, `height`, `width` and, each with `mean` and `per_frame`: `psnr` (dB), `ssim`, `lpips`,
        `vmaf` (0 to 100) and `temporal_psnr` (dB, of frame-to-frame changes). A mean PSNR is over the frames that
        differ, `identical_frames` counts the others, and `pooled` is the PSNR of the whole video's mean squared error.
        Identical videos give infinite PSNR. A metric that fails, whatever the reason, has a `mean` of None and a `note`
        that says why: LPIPS without its weights, VMAF without ffmpeg, frames too small, no memory left. The others stay.

    Raises:
        VideoError: sizes or lengths differ, or frames of a wrong type.
        ValueError: unknown lpips_net.
    """
    if lpips_net not in LPIPS_NETS:
        raise ValueError(f"lpips_net must be one of {', '.join(LPIPS_NETS)}, got {lpips_net!r}")
    taken = {
        "psnr": _Taken(metrics.squared_error),
        "ssim": _Taken(lambda a, b: metrics.ssim(a, b, device)),
        "lpips": _Taken(_lpips(lpips_net, device)),
        "temporal_psnr": _Taken(metrics.difference_error),
    }
    frames, shape = 0, (0, 0, 0, 0)
    for a, b, previous in _pairs(reference, output):
        frames, shape = frames + len(a), a.shape
        for name, metric in taken.items():
            metric.add(*(_with_previous(a, b, previous) if name == "temporal_psnr" else (a, b)))
    return {
        "frames": frames,
        "height": shape[1],
        "width": shape[2],
        "psnr": taken["psnr"].result(_psnr),
        "ssim": taken["ssim"].result(_mean),
        "lpips": {"net": lpips_net, **taken["lpips"].result(_mean)},
        "vmaf": _vmaf(reference, output),
        "temporal_psnr": taken["temporal_psnr"].result(_psnr),
    }


class _Taken:
    """The values of one metric, pass by pass; its first failure ends it and becomes its note.

    Args:
        measure: two arrays of frames -> a value each; a text: why it is not taken at all.
    """

    def __init__(self, measure):
        self._measure, self._values = measure, []
        self._note = measure if isinstance(measure, str) else None

    def add(self, a, b):
        if self._note is None:
            try:
                self._values.append(self._measure(a, b))
            except Exception as error:
                self._note = _reason(error)

    def result(self, summarize):
        return summarize(np.concatenate(self._values)) if self._note is None else {"mean": None, "note": self._note}


def failures(result):
    """What could not be measured, and why.

    Args:
        result: of `compare`.

    Returns:
        One line each, for a reader.
    """
    failed = [(name, result[name]["note"]) for name in METRICS if "per_frame" not in result[name]]
    return [f"{name} was not measured: {note}" for name, note in failed if note != _NOT_ASKED]


def _lpips(net, device):
    if net == "none":
        return _NOT_ASKED
    try:
        return metrics.Lpips(net, device)
    except Exception as error:
        return _reason(error)


def _vmaf(reference, output):
    try:
        return _mean(vmaf(reference, output))
    except VideoError:
        raise
    except Exception as error:
        return {"mean": None, "note": _reason(error)}


def _reason(error):
    """A failure in one line; errors of ours say enough, others with their kind, and no folder of the user's."""
    text = anonymous(" ".join(str(error).split()))
    ours = type(error).__module__.startswith("svg.") or isinstance(error, ValueError)
    return text if ours and text else f"{type(error).__name__}: {text}"


def _pairs(reference, output):
    """Yield matching chunks of both videos and the last pair of frames before them."""
    previous, chunk = None, []
    pairs = zip_longest(_frames(reference, "reference"), _frames(output, "output"))
    for count, (a, b) in enumerate(pairs):
        if a is None or b is None:
            raise VideoError(_lengths(a is None, count, reference, output))
        if a.shape != b.shape:
            raise VideoError(
                f"reference is {a.shape[1]} x {a.shape[0]} pixels (width x height) and output {b.shape[1]} x "
                f"{b.shape[0]}: metrics compare pixel by pixel, so generate both at one size"
            )
        chunk.append((a, b))
        if len(chunk) == metrics.frames_a_pass(*a.shape[:2]):
            yield (*map(np.stack, zip(*chunk)), previous)
            previous, chunk = chunk[-1], []
    if chunk:
        yield (*map(np.stack, zip(*chunk)), previous)


def _frames(source, name):
    return source if isinstance(source, Video) else check_frames(source, name)


def _lengths(reference_ended, count, reference, output):
    if isinstance(reference, Video) or isinstance(output, Video):
        short, long = ("reference", "output") if reference_ended else ("output", "reference")
        lengths = f"{short} ends after {count} frames and {long} goes on"
    else:
        lengths = f"reference has {len(reference)} frames and output {len(output)}"
    return f"{lengths}: metrics compare frame by frame, so generate or cut both to one length"


def _with_previous(a, b, previous):
    if previous is None:
        return a, b
    return np.concatenate([previous[0][None], a]), np.concatenate([previous[1][None], b])


def _mean(values):
    return {"mean": float(values.mean()), "per_frame": values.tolist()}


def _psnr(errors):
    values = metrics.psnr_from_error(errors)
    if not len(values):
        note = "a single frame has no changes"
        return {"mean": None, "pooled": None, "identical_frames": 0, "per_frame": [], "note": note}
    differing = values[np.isfinite(values)]
    return {
        "mean": float(differing.mean()) if len(differing) else float("inf"),
        "pooled": float(metrics.psnr_from_error(errors.mean())),
        "identical_frames": int(len(values) - len(differing)),
        "per_frame": values.tolist(),
    }
