"""Reads the flags of a program. A wrong one is answered in one line."""

import contextlib
import io
import itertools
import os
import sys
from typing import TypeVar

import tyro
from etils import epath
from tyro.constructors import PrimitiveConstructorSpec

T = TypeVar("T")


def say(line: str) -> None:
    """Prints a line, or nothing if nobody reads standard output any more."""
    try:
        print(line, flush=True)
    except OSError:
        silence()


def complain(line: str) -> None:
    """Prints to standard error, in one line even where text of the user's in it has several."""
    print(*line.splitlines(), file=sys.stderr)


def silence() -> None:
    """Sends standard output nowhere from now on."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def parse(flags: type[T], program: str | None = None) -> T:
    """Reads the program's flags, or prints help or an error and exits.

    Args:
      flags: a dataclass, whose fields are the flags.
      program: the program's name in the help; by default, the name of its file.
    """
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            return tyro.cli(flags, prog=program, use_underscores=True)
    except SystemExit as end:
        if end.code:
            complain(f"error: {_in_one_line(said.getvalue())}")
        raise
    except BrokenPipeError:  # Nobody read the help to its end.
        silence()
        sys.exit()


def _in_one_line(box: str) -> str:
    """Shortens tyro's box of many lines to its first section and its guess of what was meant."""
    # Rules and borders are ASCII where the terminal supports nothing else.
    rows = [line.strip("│| ") for line in box.splitlines()[1:-1]]
    sections = [
        list(section)
        for is_rule, section in itertools.groupby(rows, lambda row: not row.strip("─-"))
        if not is_rule
    ]
    if not sections:
        return " ".join(box.split())
    message = " ".join(sections[0]).removeprefix("Error parsing ")
    meant = [section[1] for section in sections if section[0] == "Perhaps you meant:"]
    return message + (f"; perhaps {meant[0]} was meant" if meant else "") + "; see --help"


def _folder(words: list[str]) -> epath.Path:
    if not words[0]:
        raise ValueError("an empty name is no folder")
    return epath.Path(words[0])


# Reads a flag for a folder, which may be in a bucket. An empty one, as from a variable that is not
# set, is an error.
FOLDER = PrimitiveConstructorSpec(
    nargs=1,
    metavar="DIR",
    instance_from_str=_folder,
    is_instance=lambda value: isinstance(value, os.PathLike),
    str_from_instance=lambda path: [str(path)],
)
