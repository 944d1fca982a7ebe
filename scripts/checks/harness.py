"""What the checks of this folder share: options, a verdict on every row, poisoned memory, calls that must not wait.

A check is a function that yields rows: name, what was measured, the largest value that is allowed.
"""

import argparse
import json
import math
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import triton

DEVICE = "cuda"
Check = tuple[str, float, float]  # name, measured, largest allowed


def command_line(description: str, *, sweep: str | None = None) -> argparse.ArgumentParser:
    """The options of every script; `sweep` is the help of --sweep where there is one."""
    parser = argparse.ArgumentParser(description=description.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="where to write the results (JSON)")
    parser.add_argument("--seed", type=int, default=time.time_ns() % 2**31, help="default: a new one, printed")
    parser.add_argument("--no-timing", action="store_true", help="checks only")
    if sweep is not None:
        parser.add_argument("--sweep", action="store_true", help=sweep)
    return parser


def begin(parser: argparse.ArgumentParser) -> tuple[argparse.Namespace, dict[str, Any]]:
    """The arguments, and what the results say of the machine. Exits where there is no GPU."""
    args = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit(
            f"checks/{Path(sys.argv[0]).name} needs a CUDA device: the CPU tests cover the references and the interpreter"
        )
    torch.manual_seed(args.seed)
    machine = {
        "gpu": torch.cuda.get_device_name(), "torch": torch.__version__, "triton": triton.__version__, "seed": args.seed
    }  # fmt: skip
    print(f"{machine['gpu']}, torch {machine['torch']}, triton {machine['triton']}, seed {args.seed}", flush=True)
    return args, machine


def judge(rows: Iterator[Check], name: str) -> Iterator[dict[str, Any]]:
    """Print and give the verdict on each row; a check that raises is a failed row, so that the rest still runs."""
    poison_memory()
    for label, measured, allowed in _survived(rows, name):
        measured, allowed = float(torch.as_tensor(measured).double().nan_to_num(torch.inf)), float(allowed)
        row = {"name": label, "measured": measured, "allowed": allowed, "ok": measured <= allowed}
        print(f"{'ok  ' if row['ok'] else 'FAIL'} {label:<84} {measured:.4g} <= {allowed:.4g}", flush=True)
        yield row


def _survived(rows: Iterator[Check], name: str) -> Iterator[Check]:
    try:
        yield from rows
    except Exception:
        traceback.print_exc()
        yield f"{name} raised", math.inf, 0


def judge_all(
    checks: list[Callable[[], Iterator[Check]]], rows: list[dict[str, Any]], save: Callable[[], None]
) -> None:
    """Judge every check into `rows`, and save after each."""
    for check in checks:
        started = time.perf_counter()
        rows.extend(judge(check(), check.__name__))
        print(f"     {check.__name__}: {time.perf_counter() - started:.1f} s", flush=True)
        save()


def saving(path: Path, results: dict[str, Any]) -> Callable[[], None]:
    """A function that writes the results as they are by then."""
    return lambda: path.write_text(json.dumps(results, indent=1))


def finish(rows: list[dict[str, Any]]) -> None:
    """Print the count and exit: with 1 where a row failed."""
    failed = sum(not row["ok"] for row in rows)
    print(f"{len(rows) - failed} checks passed, {failed} failed")
    sys.exit(1 if failed else 0)


def show_result(key: str, entry: dict[str, Any]) -> None:
    """One result of `svg.bench` as a line."""
    print(f"{key:<86} {entry['value']:10.4g} {entry['unit']}", flush=True)


def poison_memory() -> None:
    """Leaves NaN in the caching allocator's free blocks, so that unwritten outputs show."""
    if torch.cuda.is_available():
        torch.full((256 << 20,), float("nan"), device=DEVICE)


@contextmanager
def no_waiting() -> Iterator[None]:
    """Forbids every wait for the device."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def quietly(op: Callable, *args: Any, **kwargs: Any) -> Any:
    """Runs an operation with every wait for the device forbidden."""
    with no_waiting():
        return op(*args, **kwargs)


def differences(a: torch.Tensor, b: torch.Tensor) -> int:
    """How many bytes differ."""
    return int((a.contiguous().view(torch.uint8) != b.contiguous().view(torch.uint8)).sum())
