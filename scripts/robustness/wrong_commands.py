"""Some thousand wrong command lines, each of which must end in one clear line, early, and leave every file as it was.

    python scripts/robustness/wrong_commands.py --out wrong.json [--only pictures] [--sample 60]

All run in this process, on a folder of tiny models that is made first. Where a model would be loaded although the fault can
be known before, the case counts as late. Exit code 1 if a case is not as it must be.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import logging
import os
import random
import re
import resource
import signal
import sys
import tempfile
import time
import warnings
from collections import Counter
from pathlib import Path
from typing import Any
from unittest import mock

os.environ.setdefault("HF_HUB_OFFLINE", "1")

from command_faults import Case
from file_faults import cases
from world import State, build, state_of

SECONDS = 2.0  # for what is refused before a model is loaded
HUNG = 60
MEMORY = 12 * 2**30
_LOADERS = (
    "svg.generate.run_job.load_pipeline",
    "svg.recordings.record.load_pipeline",
    "svg.recordings.linear_precisions.load_pipeline",
    "svg.cli.generate.start",
    "svg.sweep.worker.load_pipeline",
)


class Reached(BaseException):
    """The model was about to be loaded, or processes to be started."""


class Hung(BaseException):
    """The command did not end."""


def run(case: Case, place: Path) -> tuple[list[str], dict[str, Any]]:
    """Run a case and judge it.

    Args:
        case: the case.
        place: the working folder.

    Returns:
        What is wrong with how it ended, and what it said.
    """
    for name, text in case.files.items():
        (place / name).write_text(text, encoding="utf-8")
    before = state_of(place)
    code, err, problems, seconds = _call(case)
    after = state_of(place)
    if changed := sorted({path for path, _ in before.items() ^ after.items()}):
        problems.append(f"changed {', '.join(os.path.relpath(path, place) for path in changed[:5])}")
        _put_back(before, after)
    for name in case.files:
        (place / name).unlink()
    problems += _judge(case, code, err)
    if seconds > SECONDS and not case.late:
        problems.append(f"slow: {seconds:.1f} s")
    return problems, {"code": code, "said": err.strip(), "seconds": round(seconds, 2)}


def _call(case: Case) -> tuple[int | None, str, list[str], float]:
    from svg.cli import main

    problems: list[str] = []

    def reached(*args: Any, **kwargs: Any) -> None:
        problems[:] = ["late: the model was about to be loaded"]
        raise Reached

    code, out, err = None, io.StringIO(), io.StringIO()
    signal.alarm(HUNG)
    start = time.perf_counter()
    try:
        with contextlib.ExitStack() as stack:
            if not case.late:
                for name in _LOADERS:
                    stack.enter_context(mock.patch(name, reached))
            stack.enter_context(contextlib.redirect_stdout(out))
            stack.enter_context(contextlib.redirect_stderr(err))
            code = main(list(case.arguments))
    except Reached:
        pass
    except Hung:
        problems.append(f"hung for {HUNG} s")
    except BaseException as error:
        problems.append(f"raised {type(error).__name__}: {error}")
    finally:
        seconds = time.perf_counter() - start
        signal.alarm(0)
    return code, err.getvalue(), problems, seconds


def _put_back(before: State, after: State) -> None:
    """Remove what a case left; what it changed cannot be put back, so the harness ends."""
    for path in sorted(after.keys() - before.keys(), key=len, reverse=True):
        os.rmdir(path) if os.path.isdir(path) and not os.path.islink(path) else os.remove(path)
    if lost := [path for path in before if before[path] != after.get(path)]:
        raise SystemExit(f"an input was changed: {lost}")


def _judge(case: Case, code: int | None, err: str) -> list[str]:
    if code is None:
        return []
    if code == 0:
        return ["exit code 0"]
    if not case.arguments:
        return []
    lines = [line for line in err.splitlines() if line.strip()]
    if len(lines) != 1:
        return [f"{len(lines)} lines"]
    line, problems = lines[0], []
    if "fault of svg" in line or "Traceback" in line or not line.startswith("svg: error: "):
        problems.append("no error of ours")
    if not any(name in line for name in case.names):
        problems.append("names no argument")
    if case.given.strip() and not _repeats(case.given, line):
        problems.append("does not say what was given")
    return problems


def _repeats(given: str, line: str) -> bool:
    """Whether a piece of what was given is in the line: as text, or as the number it is read as."""
    pieces = {given, os.path.normpath(given), repr(given)[1:-1], given[:60], *re.split(r"[,\s=]+", given)} - {"", "."}
    with contextlib.suppress(ValueError, OverflowError):
        pieces |= {str(float(given)), str(json.loads(given))}
    with contextlib.suppress(ValueError, RecursionError):
        pieces.add(str(json.loads(given)))
    spelt = {"null": "None", "true": "True", "false": "False", "NaN": "nan"}
    return any(piece in line for piece in pieces) or spelt.get(given, given) in line


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="write every case here, as JSON")
    parser.add_argument("--only", default="", help="families that begin with this")
    parser.add_argument("--after", type=int, default=0, help="leave out so many cases, which ran before")
    parser.add_argument("--sample", type=int, help="so many cases, drawn at random")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.disable(logging.CRITICAL)

    def hung(number: int, frame: Any) -> None:
        raise Hung

    signal.signal(signal.SIGALRM, hung)
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))  # what a case asks for must not take the machine down
    out, rows = options.out and options.out.absolute(), []
    with tempfile.TemporaryDirectory() as folder:
        place = Path(os.path.realpath(folder))
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            build(place)
        chosen = [case for case in cases() if case.family.startswith(options.only)][options.after :]
        if options.sample is not None:
            chosen = random.Random(options.seed).sample(chosen, min(options.sample, len(chosen)))
        for case in chosen:
            problems, told = run(case, place)
            rows.append({"family": case.family, "arguments": case.arguments, "problems": problems, **told})
            if problems:
                words = " ".join(word if len(word) < 80 else f"{word[:60]}..." for word in case.arguments)
                print(f"{case.family} | {words} | {'; '.join(problems)} | {told['said'][:300]}", flush=True)
        os.chdir("/")
    wrong = [row for row in rows if row["problems"]]
    counts = Counter(row["family"].partition(":")[0] for row in wrong)
    print(f"{len(rows)} command lines, {len(wrong)} not as they must be: {dict(counts)}")
    if out is not None:
        out.write_text(json.dumps(rows, indent=1))
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
