"""The output to the terminal, with a progress bar, or else to a pipe or file in plain lines."""

import importlib.util
import logging
from collections.abc import Callable
from typing import NamedTuple, Self

import rich.console
from etils import epath
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from input_pipeline.command_line import say, silence
from training.records import EpochRecord, best, best_step
from training.workdir import CHECKPOINTS, CURVES_FILE, METRICS_FILE, saved_steps

log = logging.getLogger(__name__)

# Terminal columns for the text beside the bar, with a few to spare.
BESIDE_BAR = 75

COLUMNS: tuple[tuple[str, int, Callable[[EpochRecord], str]], ...] = (
    # heading, width, formatting function
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
    """A checkpoint, and its results on the test set.

    Attributes:
      which: "best" or "last", with "plain" behind it for the weights that are not averaged.
      step: the step after which it was saved.
      epochs: the number of epochs it was trained for, which may be fractional.
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
    """Standard output; the run goes on if it breaks."""

    def on_broken_pipe(self) -> None:
        """Goes on silently once the reader of the output has gone, as `head` does."""
        self.quiet = True
        silence()
        log.warning("nobody reads standard output any more; the run goes on without it")


class Console:
    """Reports the progress of a run on standard output."""

    def __init__(self, epochs: int, facts: dict[str, str], quiet: bool = False):
        """Prints the facts of the run.

        Args:
          epochs: the number of epochs of the run.
          facts: the facts to print, by name.
          quiet: whether to print nothing at all.
        """
        self._console = _Output(highlight=False, soft_wrap=True, quiet=quiet)
        self._epochs = epochs
        self._bar = None
        for name, fact in facts.items():
            self.say(f"{name:9s} {fact}")
        if self._console.is_terminal and not quiet:
            # Leaves room for the `^C` that a terminal prints, which would start a new line.
            bar_width = min(max(self._console.width - BESIDE_BAR, 4), 40)
            columns = (
                TextColumn("{task.description}"),
                BarColumn(bar_width),
                TextColumn("{task.fields[averages]}"),
                TimeRemainingColumn(),
            )
            self._bar = Progress(*columns, console=self._console, transient=True)
            self._task = self._bar.add_task("compiling", total=None, averages="")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Removes the bar."""
        if self._bar is not None:
            self._bar.stop()

    def say(self, line: str) -> None:
        """Prints one line as it is."""
        self._print(line)

    def _print(self, what: str | Table) -> None:
        try:
            self._console.print(what, markup=False)
        except OSError:  # For example, a full disk.
            self._console.on_broken_pipe()

    def progress(self, epoch: int, done: float, averages: dict[str, float]) -> None:
        """Moves the bar.

        Args:
          epoch: the number of the current epoch, counted from 1.
          done: the fraction of the epoch that is done, 0 to 1.
          averages: ``loss``, ``accuracy``, ``eta``, ``images_per_second`` over that fraction.
        """
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
        """Reports that the programs are being compiled, by an indeterminate bar if there is one."""
        if self._bar is None:
            self.say("compiling")
        else:
            self._bar.start()

    def begin(self, compile_seconds: float) -> None:
        """Prints the heading above the lines of the epochs, and prepares the bar below them."""
        self.say(f"compiled in {compile_seconds:.1f} s")
        self.say("  ".join(f"{name:>{width}}" for name, width, _ in COLUMNS))
        if self._bar is not None:
            self._bar.reset(self._task, total=self._epochs, description=f"epoch 1/{self._epochs}")

    def epoch(self, record: EpochRecord) -> None:
        """Prints the line of an epoch."""
        self.say("  ".join(f"{text(record):>{width}}" for _, width, text in COLUMNS))

    def summary(
        self, records: list[EpochRecord], before: int, seconds: float, workdir: epath.Path
    ) -> None:
        """Prints the table at the end, and the paths of the run's files.

        Args:
          records: the records of all epochs.
          before: how many of these epochs an earlier process trained.
          seconds: the time that this process took, in seconds.
          workdir: the folder of the run.
        """
        first, last = records[0], records[-1]
        best_epoch = best(records)
        table = Table(title="Result", title_justify="left", show_header=False)
        training = sum(r.seconds for r in records[before:])
        rows = {
            "test accuracy": f"{last.test_accuracy:.2%} after epoch {last.epoch}, best "
            f"{best_epoch.test_accuracy:.2%} after epoch {best_epoch.epoch}",
            "test loss": f"{last.test_loss:.4f}",
            "plain weights": _plain(last),
            "training loss": f"{last.train_loss:.4f}, accuracy {last.train_accuracy:.2%}",
            "eta": f"{first.eta:.4f} in the first epoch, {last.eta:.4f} in the last",
            "time": f"{seconds:.1f} s, {training:.1f} s of them training",
            "checkpoints": _checkpoints(records, workdir),
        }
        for name, text in rows.items():
            if text:
                table.add_row(name, text)
        self._print(table)
        self.say(f"curves     {workdir / CURVES_FILE}")
        self.say(f"metrics    {workdir / METRICS_FILE}")
        if importlib.util.find_spec("tensorboard"):
            self.say(f"dashboard  tensorboard --logdir {workdir}")


def _plain(record: EpochRecord) -> str:
    """Returns the table entry of what the weights reach that are not averaged, where some are."""
    if record.plain_test_accuracy is None:
        return ""
    return f"{record.plain_test_accuracy:.2%}, loss {record.plain_test_loss:.4f}, not averaged"


def _checkpoints(records: list[EpochRecord], workdir: epath.Path) -> str:
    """Returns the table entry that lists the available checkpoints."""
    folder, steps = workdir / CHECKPOINTS, {*saved_steps(workdir)}
    if not steps:
        return "none"
    top, last = best_step(records, steps), max(steps)
    which = f"{last} (best and last)" if top in (last, None) else f"{top} (best), {last} (last)"
    return f"{which}, in {folder}"
