"""The process that a command runs in: its command line, and what libraries print into it."""

from __future__ import annotations

import shlex
import sys


def command_text() -> str:
    """The command line of this process, quoted for a POSIX shell."""
    return shlex.join(["svg", *sys.argv[1:]])


def quiet_loading() -> None:
    """The libraries' own bars for local files say nothing; those of downloads stay."""
    import diffusers
    import transformers

    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()
