import contextlib
import io
import subprocess
import sys
from dataclasses import dataclass
from typing import Literal
from unittest import mock

from hypothesis import given, settings
from hypothesis import strategies as st

from input_pipeline.command_line import parse


@dataclass
class Flags:
    """A flag for each kind of value that is not any text."""

    number: int = 0
    limit: int | None = None
    share: float = 1.0
    which: Literal["best", "last"] = "best"


@settings(max_examples=200)
@given(
    flag=st.sampled_from(["--number", "--limit", "--share", "--which"]),
    # Also what the parser frames its errors with.
    text=st.text() | st.text("─│| \n-x"),
)
def test_text_is_read_in_silence_or_refused_in_one_line(flag, text):
    out, err = io.StringIO(), io.StringIO()
    with (
        mock.patch.object(sys, "argv", ["program", flag, text]),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
    ):
        try:
            parse(Flags)
            ended = None
        except SystemExit as end:
            ended = end.code
    lines = err.getvalue().splitlines()
    assert (ended, len(lines), out.getvalue()) in [(None, 0, ""), (2, 1, "")]


def test_help_that_nobody_reads_ends_in_silence():
    command = [sys.executable, "-m", "input_pipeline.prepare", "--help"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(command, **pipes) as process:
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 0
