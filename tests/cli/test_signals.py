"""Signals that end a command, whenever they come."""

import signal
import time

import pytest

from svg.cli.signals import end_as_interrupted


class Interrupted:
    """A destructor that a signal comes into."""

    def __init__(self, number):
        self.number = number

    def __del__(self):
        signal.raise_signal(self.number)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_is_not_lost_in_a_destructor(number, capsys):
    begun = time.monotonic()
    with pytest.raises(KeyboardInterrupt), end_as_interrupted():
        Interrupted(number)
        time.sleep(20)
    assert time.monotonic() - begun < 10 and capsys.readouterr().err == ""


def test_other_exceptions_of_destructors_are_told_as_ever(monkeypatch):
    told = []
    monkeypatch.setattr("sys.unraisablehook", told.append)

    class Broken:
        def __del__(self):
            raise ValueError("broken")

    with end_as_interrupted():
        Broken()
    assert [what.exc_type for what in told] == [ValueError]
