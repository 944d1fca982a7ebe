"""What a run may be asked for besides a method's settings."""

import re

from ..documents import shown

DTYPES = ("bf16", "fp16", "fp32")
OFFLOADS = ("none", "model", "group", "sequential")  # what waits in CPU memory: nothing, components, blocks, layers


def check_device_name(device: object) -> None:
    """Raise unless a device has a name that svg knows; whether it is there is for torch to say."""
    if not isinstance(device, str):
        raise TypeError(f"device must be text, got {shown(device)}")
    if not re.fullmatch(r"auto|cpu|cuda(:[0-9]{1,4})?", device):
        raise ValueError(f"device must be auto, cpu, cuda or cuda:<index>, got {shown(device)}")
