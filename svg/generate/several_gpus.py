"""`svg generate --gpus N`: the same command in N processes, started by torchrun's launcher; one message if one stops."""

from __future__ import annotations

import json
import logging
import os
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

ERROR_FILE = "TORCHELASTIC_ERROR_FILE"  # where the launcher looks for a process' last words


def rank() -> int | None:
    """Which of the launcher's processes this one is, or None where it is none of them."""
    return int(os.environ["RANK"]) if ERROR_FILE in os.environ and "RANK" in os.environ else None


def last_words(text: str, code: int) -> None:
    """Leave an error's line, and an exit code, to the process that started this one, which says it once."""
    words = {"message": text, "timestamp": int(time.time()), "code": code}
    Path(os.environ[ERROR_FILE]).write_text(json.dumps(words))


def check_gpus(gpus: int, device: str) -> None:
    """Refuse more processes than there are GPUs; without any they share the CPU.

    Args:
        gpus: how many are asked for.
        device: "auto", "cuda" or "cpu".

    Raises:
        ValueError: torch sees fewer.
    """
    import torch

    there = torch.cuda.device_count()
    if device != "cpu" and 0 < there < gpus:
        raise ValueError(f"--gpus must be at most {there}, the GPUs visible to torch, got {gpus}")


def start(arguments: Sequence[str], processes: int) -> tuple[int, str | None]:
    """Run `svg` with the same arguments in several processes that know of each other.

    Args:
        arguments: of the command line, without the program's name.
        processes: how many.

    Returns:
        Exit code, and what the first process to stop said, or None.
    """
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    logging.getLogger("torch.distributed").setLevel(logging.CRITICAL)
    with tempfile.TemporaryDirectory(prefix="svg-") as folder:
        config = LaunchConfig(
            min_nodes=1, max_nodes=1, nproc_per_node=processes, max_restarts=0, rdzv_backend="c10d",
            rdzv_endpoint="localhost:0", run_id=Path(folder).name, logs_specs=DefaultLogsSpecs(log_dir=folder),
        )  # fmt: skip
        # -P: the folder that a command is run in must not offer modules.
        command = ("-P", "-m", "svg", *arguments)
        try:
            codes = elastic_launch(config, sys.executable)(*command)
        except ChildFailedError as error:
            return _why(error.failures)
        except (SignalException, KeyboardInterrupt):
            return 130, None
    return max((code or 0 for code in codes.values()), default=0), None


def _why(failures: Mapping[int, Any]) -> tuple[int, str | None]:
    """The words of those who said some; whoever was ended because another had stopped said none."""
    spoken = {place: failure for place, failure in failures.items() if "message" in failure.error_file_data}
    spoken = {place: failure for place, failure in spoken.items() if os.path.isfile(failure.error_file)} or spoken
    if not spoken:
        place, failure = min(failures.items(), key=lambda item: (item[1].timestamp, item[0]))
        return 1, f"process {place} of {len(failures)} ended with exit code {failure.exitcode}"
    place, failure = min(spoken.items())
    everyone = {other.error_file_data["message"] for other in spoken.values()}
    where = "" if place == 0 or len(everyone) == 1 < len(spoken) else f"GPU {place}: "
    return failure.error_file_data["code"], f"{where}{failure.error_file_data['message']}"


def quiet(display: Any) -> Any:
    """A display for all processes but the first: whatever it is told, it says nothing."""
    return display if not rank() else _Silent()


class _Silent:
    def stage(self, text: str) -> None:
        """A new stage begins."""

    def run(self, name: str, steps: int) -> Any:
        """A timed run begins."""
        return nullcontext(lambda progress: None)
