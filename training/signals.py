"""SIGTERM and Ctrl-C: a run finishes its step, saves itself, and ends."""

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from etils import epath

from input_pipeline.command_line import silence

# How long a run that is asked to end waits for data, and for who reads them, that may never come.
PATIENCE_SECONDS = 10

SIGNALS = (signal.SIGTERM, signal.SIGINT)


class Stopped(Exception):  # noqa: N818, nothing went wrong
    """A run was asked to end, and has saved itself.

    Attributes:
      signum: the number of the signal that asked.
      stalled: whether data are still being read that do not come.
    """

    def __init__(self, signum: int, saved: epath.Path, stalled: bool = False):
        """Says where it goes on.

        Args:
          signum: the number of the signal.
          saved: the last checkpoint.
          stalled: whether data are still being read that do not come.
        """
        super().__init__(
            f"{signal.Signals(signum).name} after step {saved.name}; the same command with "
            f"--workdir {saved.parent.parent}, and without --restart, goes on from there"
        )
        self.signum, self.stalled = signum, stalled


@dataclass
class Request:
    """Whether the run is asked to end.

    Attributes:
      signum: the number of the signal that asks, or 0.
    """

    signum: int = 0


def end_at_once() -> None:
    """Makes SIGTERM and SIGINT end the process, while there is nothing to save.

    Not by an exception, which is lost where JAX calls Python without expecting one.
    """

    def end(signum: int, frame: object) -> None:
        _say(f"stopped: {signal.Signals(signum).name}\n", final=True)
        os._exit(128 + signum)

    for signum in SIGNALS:
        signal.signal(signum, end)


def _say(line: str, final: bool = False) -> None:
    """Writes to standard error, in place of a bar on the terminal, and shows the cursor again.

    Not by print, which may be what the signal has interrupted.

    Args:
      line: what to write.
      final: whether the process ends next; the bar is then drawn no more.
    """
    message = line.encode()
    if os.isatty(1):
        terminal, clear = os.dup(1), b"\r\x1b[2K\x1b[?25h"
        if final:
            silence()
        if os.isatty(2):
            # In one write, or the thread that draws the bar would draw it in between.
            message = clear + message
        else:
            os.write(terminal, clear)
        os.close(terminal)
    os.write(2, message)


@contextmanager
def on_request() -> Iterator[Request]:
    """While it is open, SIGTERM and SIGINT only make a request; a second SIGINT ends at once.

    In another thread than the main one, where Python handles no signals, there is never a request.
    """
    request, interrupts = Request(), 0
    if threading.current_thread() is not threading.main_thread():
        yield request
        return

    def note(signum: int, frame: object) -> None:
        nonlocal interrupts
        interrupts += signum == signal.SIGINT
        if interrupts > 1:
            _say("", final=True)
            # Not an exception, which would wait for threads and for what is being saved.
            os._exit(128 + signum)
        request.signum = request.signum or signum
        if signum == signal.SIGINT:
            # The bar is drawn again on the next line.
            _say("saving after this step; Ctrl-C again ends at once\n")

    before = {signum: signal.signal(signum, note) for signum in SIGNALS}
    try:
        yield request
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)
