"""The outputs of a run: terminal, config, metrics, TensorBoard events, plots."""

import contextlib
import json
import logging
import math
import os
import time
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Self

from training.config import TrainConfig
from training.errors import ConfigError, SaveError
from training.records import EpochRecord
from training.reporting.console import Console
from training.workdir import CONFIG_FILE, CURVES_FILE, METRICS_FILE

log = logging.getLogger(__name__)

# A plot keeps a core busy for a fifth of a second, which short epochs need for themselves.
SECONDS_BETWEEN_PICTURES = 2


class SilentReporter:
    """Reports and writes nothing: for the processes other than the primary one."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        pass

    def compiling(self) -> None:
        """Reports that the programs of the run are being compiled."""

    def begin(self, compile_seconds: float) -> None:
        """Reports that everything is ready for the first epoch."""

    def progress(self, epoch: int, done: float, averages: dict[str, float]) -> None:
        """Moves the bar.

        Args:
          epoch: the number of the current epoch, counted from 1.
          done: the fraction of the epoch that is done, 0 to 1.
          averages: ``loss``, ``accuracy``, ``eta``, ``images_per_second`` over that fraction.
        """

    def epoch(self, record: EpochRecord) -> None:
        """Writes and shows the record of an epoch.

        Raises:
          SaveError: if it cannot be written.
        """


class Reporter(SilentReporter):
    """Writes the files of a run and reports on it; a context manager around its epochs.

    Attributes:
      records: the records of the epochs so far.
    """

    def __init__(
        self, config: TrainConfig, workdir: Path, facts: dict[str, str], records: list[EpochRecord]
    ):
        """Writes the first files and prints the facts of the run.

        Args:
          config: the resolved config of the run.
          workdir: the folder of the run.
          facts: the facts to print at the start, by name.
          records: the records of the epochs before the checkpoint that the run resumes from. Any
            later records of an interrupted run are dropped, and those epochs run again.

        Raises:
          ConfigError: if the folder cannot be written.
        """
        from training.reporting.tensorboard import EventFile

        self.records = list(records)
        self._workdir = workdir
        self._start, self._before = time.perf_counter(), len(records)
        try:
            _write(workdir / CONFIG_FILE, json.dumps(config.to_json(), indent=2) + "\n")
            lines = (json.dumps(record.to_json()) + "\n" for record in records)
            _write(workdir / METRICS_FILE, "".join(lines))
            self._metrics = open(workdir / METRICS_FILE, "a")  # noqa: SIM115, closed in __exit__
            seen = records[-1].step if records else 0
            self._tensorboard = EventFile(workdir, seen + 1)
        except OSError as error:
            raise ConfigError(f"--workdir {workdir}: {error.strerror}") from error
        self._curves = CurvesDrawer(workdir / CURVES_FILE, f"{config.arch} on {config.dataset}")
        self._console = Console(config.epochs, facts | {"workdir": os.fspath(workdir)})

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._curves.close()
        self._console.close()
        with contextlib.suppress(OSError):  # The failure to write has been reported.
            self._tensorboard.close()
            self._metrics.close()
        if kind is None:
            seconds = time.perf_counter() - self._start
            self._console.summary(self.records, self._before, seconds, self._workdir)

    def compiling(self) -> None:
        """Reports that the programs of the run are being compiled."""
        self._console.compiling()

    def begin(self, compile_seconds: float) -> None:
        """Reports that everything is ready for the first epoch, and shows the bar."""
        self._console.begin(compile_seconds)

    def progress(self, epoch: int, done: float, averages: dict[str, float]) -> None:
        """Moves the bar."""
        self._console.progress(epoch, done, averages)

    def epoch(self, record: EpochRecord) -> None:
        """Writes the record, shows it, and has the plots drawn."""
        self.records.append(record)
        try:
            self._metrics.write(json.dumps(record.to_json()) + "\n")
            self._metrics.flush()
            self._tensorboard.write(record)
        except OSError as error:
            raise SaveError(f"cannot write in {self._workdir}: {error.strerror}") from error
        self._curves.draw(self.records)
        self._console.epoch(record)


def _write(path: Path, text: str) -> None:
    """Writes a file whole or not at all."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text)
    os.replace(partial, path)


class CurvesDrawer:
    """Draws in a thread, so that no device waits for a plot.

    Epochs that end while a plot is being drawn, or soon after, share the next plot.
    """

    def __init__(self, path: Path, title: str):
        self._path, self._title, self._last = path, title, -math.inf
        self._thread = ThreadPoolExecutor(max_workers=1)
        self._drawing: Future[None] | None = None
        self._waiting: list[EpochRecord] = []

    def draw(self, records: list[EpochRecord]) -> None:
        """Requests a plot of these records."""
        self._waiting = list(records)
        idle = self._drawing is None or self._drawing.done()
        if idle and time.monotonic() - self._last >= SECONDS_BETWEEN_PICTURES:
            self._last = time.monotonic()
            self._drawing = self._thread.submit(self._draw)

    def close(self) -> None:
        """Waits until the last requested plot is drawn."""
        if self._drawing is not None:
            self._drawing.result()
            self._draw()
        self._thread.shutdown()

    def _draw(self) -> None:
        from training.reporting.curves import draw

        while self._waiting:
            records, self._waiting = self._waiting, []
            try:
                draw(records, self._title, self._path)
            except OSError as error:
                log.warning("cannot draw %s: %s", self._path, error.strerror)
