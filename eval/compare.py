"""One video against another: every metric, streamed, as a plain dict for report.json."""

from itertools import zip_longest

import numpy as np

from . import metrics
from .lpips_weights import LpipsWeightsError
from .names import LPIPS_NETS
from .video import Video, VideoError, check_frames
from .vmaf import VmafError, vmaf


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
        Identical videos give infinite PSNR. Without LPIPS weights `lpips.mean` is None and `lpips.note` says how to
        get them; so for VMAF without ffmpeg or on frames too small for it.

    Raises:
        VideoError: sizes or lengths differ, or frames of a wrong type.
        ValueError: unknown lpips_net, or frames too small for a metric.
    """
    if lpips_net not in LPIPS_NETS:
        raise ValueError(f"lpips_net must be one of {', '.join(LPIPS_NETS)}, got {lpips_net!r}")
    lpips, note = _lpips(lpips_net, device)
    errors, changes, similarities, distances = [], [], [], []
    shape = None
    for a, b, previous in _pairs(reference, output):
        shape = a.shape
        errors.append(metrics.squared_error(a, b))
        changes.append(metrics.difference_error(*_with_previous(a, b, previous)))
        similarities.append(metrics.ssim(a, b, device))
        if lpips:
            distances.append(lpips(a, b))
    errors = np.concatenate(errors)
    return {
        "frames": len(errors),
        "height": shape[1],
        "width": shape[2],
        "psnr": _psnr(errors),
        "ssim": _mean(np.concatenate(similarities)),
        "lpips": {"net": lpips_net, **(_mean(np.concatenate(distances)) if lpips else {"mean": None, "note": note})},
        "vmaf": _vmaf(reference, output),
        "temporal_psnr": _psnr(np.concatenate(changes)),
    }


def _lpips(net, device):
    if net == "none":
        return None, "not asked for"
    try:
        return metrics.Lpips(net, device), None
    except LpipsWeightsError as error:
        return None, str(error)


def _vmaf(reference, output):
    try:
        return _mean(vmaf(reference, output))
    except VmafError as error:
        return {"mean": None, "note": str(error)}


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
