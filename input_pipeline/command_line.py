"""Reading the flags of a program, where a wrong one is answered in one line."""

import contextlib
import io
import itertools
import sys
from pathlib import Path
from typing import TypeVar

import tyro
from tyro.constructors import PrimitiveConstructorSpec

T = TypeVar("T")


def parse(flags: type[T], program: str | None = None) -> T:
    """Reads what the program was started with, or prints help or an error, and exits.

    Args:
      flags: a dataclass, whose fields are the flags.
      program: how help calls the program; by default, by the name of its file.
    """
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            return tyro.cli(flags, prog=program, use_underscores=True)
    except SystemExit as end:
        if end.code:
            print(f"error: {_in_one_line(said.getvalue())}", file=sys.stderr)
        raise


def _in_one_line(box: str) -> str:
    """What tyro says in a box of many: its first section, and what it takes for meant."""
    rows = (line.strip("│ ") for line in box.splitlines()[1:-1])
    sections = [
        list(section)
        for is_rule, section in itertools.groupby(rows, lambda row: row.startswith("─"))
        if not is_rule
    ]
    message = " ".join(sections[0]).removeprefix("Error parsing ")
    meant = [section[1] for section in sections if section[0] == "Perhaps you meant:"]
    return message + (f"; perhaps {meant[0]} was meant" if meant else "") + "; see --help"


def _folder(words: list[str]) -> Path:
    if not words[0]:
        raise ValueError("an empty name is no folder; leave the flag out, or give one")
    return Path(words[0])


# How a flag for a folder is read. An empty one, as of a variable that is not set, is an error.
FOLDER = PrimitiveConstructorSpec(
    nargs=1,
    metavar="DIR",
    instance_from_str=_folder,
    is_instance=lambda value: isinstance(value, Path),
    str_from_instance=lambda path: [str(path)],
)
