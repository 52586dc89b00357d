"""How every command-line program here begins and ends: parse, run, and turn what went wrong into one line.

Exit status: 0 done, 2 a mistake in what the user gave, 130 Ctrl-C, 141 the reader of standard output went away.
"""

from __future__ import annotations

import argparse
import io
import os
import sys
from collections.abc import Callable, Sequence

from .errors import ArceeError


def run_program(
    name: str,
    description: str,
    add_arguments: Callable[[argparse.ArgumentParser], None],
    run: Callable[[argparse.Namespace], int],
    argv: Sequence[str] | None = None,
) -> int:
    """Runs a command as a program of its own and returns its exit status."""
    open_missing_streams()
    parser = argparse.ArgumentParser(prog=name, description=description)
    add_arguments(parser)
    args = parser.parse_args(argv)
    return run_reporting(lambda: run(args))


def open_missing_streams() -> None:
    """Gives the program the standard streams it was started without, as daemons and some launchers do.

    Otherwise a later file gets descriptor 0, which MLX takes for a failure, and notes for standard error go elsewhere.
    """
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode))  # noqa: SIM115 - for the life of the process
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a terminal or pipe that cannot show a character shows a mark


def run_reporting(run: Callable[[], int]) -> int:
    """Calls `run`; an ArceeError becomes one line on standard error and status 2, Ctrl-C becomes 130."""
    try:
        status = run()
        sys.stdout.flush()
        return status
    except ArceeError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # Python would complain again when it closes standard output at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except OSError as error:
        print(f"error: {error}; expected to be able to read and write what was named", file=sys.stderr)
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 2
