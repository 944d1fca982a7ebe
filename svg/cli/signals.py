"""Signals that end a command as Ctrl-C does: what it had begun is cleared away, what is finished stays."""

from __future__ import annotations

import _thread
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

_ENDING = ("SIGTERM", "SIGHUP")


@contextmanager
def end_as_interrupted() -> Iterator[None]:
    """Raise KeyboardInterrupt on SIGTERM and SIGHUP too; a signal that is ignored, as under nohup, stays so.

    One that comes while a destructor runs, where Python drops exceptions, is raised once more when that is over.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {}
    for name in _ENDING:
        number = getattr(signal, name, None)
        if number is not None and signal.getsignal(number) == signal.SIG_DFL:
            before[number] = signal.signal(number, _interrupt)
    hook, sys.unraisablehook = sys.unraisablehook, _once_more(sys.unraisablehook)
    try:
        yield
    finally:
        sys.unraisablehook = hook
        for number, handler in before.items():
            signal.signal(number, handler)


def _interrupt(number: int, frame: Any) -> None:
    raise KeyboardInterrupt


def _once_more(others: Callable[[Any], object]) -> Callable[[Any], object]:
    def dropped(what: Any) -> None:
        if not issubclass(what.exc_type, KeyboardInterrupt):
            others(what)
            return
        later = threading.Timer(0.01, _interrupt_main)
        later.daemon = True
        later.start()

    return dropped


def _interrupt_main() -> None:
    if hasattr(signal, "pthread_kill"):
        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)  # a system call that waits ends too
    else:
        _thread.interrupt_main()
