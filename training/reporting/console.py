"""The terminal: a bar where there is one, plain lines where there is not."""

import importlib.util
import logging
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import rich.console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from input_pipeline.command_line import say
from training.records import EpochRecord, best, best_step
from training.workdir import CHECKPOINTS, CURVES_FILE, METRICS_FILE

log = logging.getLogger(__name__)

# Columns of the terminal for what stands beside the bar, and a few to spare.
BESIDE_BAR = 75

COLUMNS: tuple[tuple[str, int, Callable[[EpochRecord], str]], ...] = (
    # heading, width, how it is written
    ("epoch", 5, lambda r: str(r.epoch)),
    ("train loss", 10, lambda r: f"{r.train_loss:.4f}"),
    ("acc", 6, lambda r: f"{r.train_accuracy:.1%}"),
    ("test loss", 9, lambda r: f"{r.test_loss:.4f}"),
    ("acc", 6, lambda r: f"{r.test_accuracy:.1%}"),
    ("eta", 6, lambda r: f"{r.eta:.4f}"),
    ("range of eta", 13, lambda r: f"{r.eta_min:.4f}-{r.eta_max:.4f}"),
    ("images/s", 9, lambda r: f"{r.images_per_second:,.0f}"),
)


class EvalResult(NamedTuple):
    """A checkpoint, and what it reaches on the test set.

    Attributes:
      which: "best" or "last".
      step: the step after which it was saved.
      epochs: how many it has been trained for, perhaps with a part of one.
      loss: the mean loss.
      accuracy: the accuracy, 0 to 1.
    """

    which: str
    step: int
    epochs: float
    loss: float
    accuracy: float


def print_results(results: list[EvalResult]) -> None:
    """Prints the table of ``--eval_only``."""
    say("checkpoint    step   epoch  test loss     acc")
    for r in results:
        say(f"{r.which:10s}  {r.step:6d}  {r.epochs:6.4g}  {r.loss:9.4f}  {r.accuracy:6.2%}")


class _Output(rich.console.Console):
    """Standard output, which a run outlives."""

    def on_broken_pipe(self) -> None:
        """Goes on in silence where whoever was reading has gone, as `head` does."""
        self.quiet = True
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        log.warning("nobody reads standard output any more; the run goes on without it")


class Console:
    """Says what happens, on standard output."""

    def __init__(self, epochs: int, facts: dict[str, str]):
        """Says what was resolved.

        Args:
          epochs: how many there will be.
          facts: what to say, by name.
        """
        self._console = _Output(highlight=False, soft_wrap=True)
        self._epochs = epochs
        self._bar = None
        for name, fact in facts.items():
            self.say(f"{name:9s} {fact}")
        if self._console.is_terminal:
            # Room is left for the `^C` that a terminal prints, which would begin another line.
            bar_width = min(max(self._console.width - BESIDE_BAR, 4), 40)
            columns = (
                TextColumn("{task.description}"),
                BarColumn(bar_width),
                TextColumn("{task.fields[averages]}"),
                TimeRemainingColumn(),
            )
            self._bar = Progress(*columns, console=self._console, transient=True)
            self._task = self._bar.add_task("compiling", total=None, averages="")

    def say(self, line: str) -> None:
        """One line, as it is."""
        self._print(line)

    def _print(self, what: str | Table) -> None:
        try:
            self._console.print(what, markup=False)
        except OSError:  # As of a disk that is full.
            self._console.on_broken_pipe()

    def progress(self, epoch: int, done: float, averages: dict[str, float]) -> None:
        """Moves the bar; see :meth:`training.reporting.Reporter.progress`."""
        if self._bar is None:
            return
        text = (
            f"loss {averages['loss']:.4f}  acc {averages['accuracy']:.1%}  "
            f"eta {averages['eta']:.4f}  {averages['images_per_second']:,.0f} img/s"
        )
        self._bar.update(
            self._task,
            description=f"epoch {epoch}/{self._epochs}",
            completed=epoch - 1 + done,
            averages=text,
        )

    def compiling(self) -> None:
        """Says that the programs of the run are being compiled, in a bar that only moves."""
        if self._bar is None:
            self.say("compiling")
        else:
            self._bar.start()

    def begin(self, compile_seconds: float) -> None:
        """The heading over the lines of the epochs, and the bar under them."""
        self.say(f"compiled in {compile_seconds:.1f} s")
        self.say("  ".join(f"{name:>{width}}" for name, width, _ in COLUMNS))
        if self._bar is not None:
            self._bar.reset(self._task, total=self._epochs, description=f"epoch 1/{self._epochs}")

    def epoch(self, record: EpochRecord) -> None:
        """The line of an epoch."""
        self.say("  ".join(f"{text(record):>{width}}" for _, width, text in COLUMNS))

    def close(self) -> None:
        """Takes the bar away."""
        if self._bar is not None:
            self._bar.stop()

    def summary(
        self, records: list[EpochRecord], before: int, seconds: float, workdir: Path
    ) -> None:
        """The table at the end, and where things are.

        Args:
          records: of all epochs.
          before: how many of them an earlier process has trained.
          seconds: that this one took.
          workdir: of the run.
        """
        first, last = records[0], records[-1]
        best_epoch = best(records)
        table = Table(title="Result", title_justify="left", show_header=False)
        training = sum(r.seconds for r in records[before:])
        rows = {
            "test accuracy": f"{last.test_accuracy:.2%} after epoch {last.epoch}, best "
            f"{best_epoch.test_accuracy:.2%} after epoch {best_epoch.epoch}",
            "test loss": f"{last.test_loss:.4f}",
            "training loss": f"{last.train_loss:.4f}, accuracy {last.train_accuracy:.2%}",
            "eta": f"{first.eta:.4f} in the first epoch, {last.eta:.4f} in the last",
            "time": f"{seconds:.1f} s, {training:.1f} s of them training",
            "checkpoints": _checkpoints(records, workdir),
        }
        for name, text in rows.items():
            table.add_row(name, text)
        self._print(table)
        self.say(f"curves     {workdir / CURVES_FILE}")
        self.say(f"metrics    {workdir / METRICS_FILE}")
        if importlib.util.find_spec("tensorboard"):
            self.say(f"dashboard  tensorboard --logdir {workdir}")


def _checkpoints(records: list[EpochRecord], workdir: Path) -> str:
    """Which there are to use, as the table has it."""
    folder = workdir / CHECKPOINTS
    steps = {int(path.name) for path in folder.glob("*") if path.name.isdigit()}
    if not steps:
        return "none"
    top, last = best_step(records, steps), max(steps)
    which = f"{last} (best and last)" if top in (last, None) else f"{top} (best), {last} (last)"
    return f"{which}, in {folder}"
