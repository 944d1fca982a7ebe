"""`svg`: a command a file, and how errors end.

Nothing heavy is imported before a command runs.
"""

from __future__ import annotations

import logging
import os
import sys

import click

from .. import __version__
from ..generate.several_gpus import last_words, rank
from .adapt import adapt
from .adapt_linears import adapt_linears
from .bench import bench
from .doctor import doctor
from .evaluate import evaluate
from .generate import generate
from .models import models
from .page import page
from .panels import SETTINGS, Group
from .presets import presets
from .record import record
from .signals import end_as_interrupted
from .sparge_tune import sparge_tune
from .sweep import sweep
from .tune import tune

_LONGEST = 1500  # characters of an error's line: what was given may be a megabyte


@click.group(cls=Group, context_settings={"help_option_names": ["-h", "--help"], **SETTINGS})
@click.version_option(__version__, prog_name="svg")
def cli() -> None:
    """Sparse attention for video diffusion transformers: the same video, faster, no retraining.

    Set SVG_TRACEBACK=1 to see where an error came from.

    \b
    Example:
      svg generate "a large red circle moving right, the camera is still"
    """


for command in (
    *(generate, evaluate, sweep, tune, record, sparge_tune, adapt, adapt_linears),
    *(page, presets, models, bench, doctor),
):
    cli.add_command(command)


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; every error a user can cause is one line on stderr.

    Args:
        arguments: command-line arguments; None: those of the process.

    Returns:
        0, or 1 when something failed on this machine, 2 on bad input, 130 when interrupted.
    """
    logging.getLogger("svg").addHandler(logging.NullHandler())  # notes and tables say what the library would log
    try:
        with end_as_interrupted():
            code = cli.main(arguments, prog_name="svg", standalone_mode=False)
            sys.stdout.flush()  # a full disk or a closed pipe behind it shows here, not in the interpreter's last words
        return code if isinstance(code, int) else 0
    except click.exceptions.NoArgsIsHelpError as help_text:
        click.echo(help_text.format_message())
        return 2
    except click.ClickException as error:
        return _fail(error, error.format_message())
    except (click.Abort, KeyboardInterrupt):
        if rank() is None:
            click.echo("interrupted: nothing was written", err=True)
        return 130
    except (ValueError, TypeError, NotImplementedError, ArithmeticError, OSError) as error:
        return _fail(error, str(error))
    except Exception as error:
        if _is_out_of_memory(error):
            _fail(error, f"{error}. Use fewer frames, a smaller size, --offload model or --vae-tiling")
        else:
            text = f"{type(error).__name__}: {error}"
            _fail(error, f"unexpected {text}: this is a fault of svg, SVG_TRACEBACK=1 tells where, please report it")
        return 1


def _fail(error: Exception, message: str) -> int:
    from .console import visible

    if os.environ.get("SVG_TRACEBACK"):
        raise error
    text = visible(" ".join(message.split()))
    text = text if len(text) <= _LONGEST else text[:_LONGEST] + " ..."
    if rank() is None:
        click.echo(f"svg: error: {text}", err=True)
    else:
        last_words(text, 2)
    return 2


def _is_out_of_memory(error: Exception) -> bool:
    # torch's classes and words, without importing torch
    return (
        isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError" or "allocate memory" in str(error)
    )
