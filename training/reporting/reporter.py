"""The outputs of a run: terminal, config, metrics, TensorBoard events, plots."""

import contextlib
import json
import logging
import os
import sys
import time
from collections.abc import Iterator

from etils import epath

from input_pipeline import cloud
from training.config import TrainConfig
from training.errors import ConfigError, SaveError
from training.records import EpochRecord
from training.reporting.console import Console
from training.workdir import CONFIG_FILE, CURVES_FILE, METRICS_FILE, RewrittenFile, write

log = logging.getLogger(__name__)

# The maximum share of a run's time that is spent on plots, since training waits for them.
DRAWING_SHARE = 0.01


class Reporter(Console):
    """Writes the files of a run and reports on it; a context manager around its epochs.

    Attributes:
      records: the records of the epochs so far.
    """

    def __init__(
        self,
        config: TrainConfig,
        workdir: epath.Path,
        facts: dict[str, str],
        records: list[EpochRecord],
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
        with _hidden("google.cloud.storage"):
            # Which tensorboardX would load for most of a second, to do what RewrittenFile does.
            from training.reporting.tensorboard import EventFile

        self.records = list(records)
        self._workdir = workdir
        self._start, self._before = time.perf_counter(), len(records)
        try:
            write(workdir / CONFIG_FILE, (json.dumps(config.to_json(), indent=2) + "\n").encode())
            metrics, lines = workdir / METRICS_FILE, b"".join(map(_line, records))
            write(metrics, lines)
            remote = cloud.is_remote(metrics)
            # Closed in __exit__.
            self._metrics = RewrittenFile(metrics, lines) if remote else open(metrics, "ab")  # noqa: SIM115
            seen = records[-1].step if records else 0
            self._tensorboard = EventFile(workdir, seen + 1)
        except OSError as error:
            raise ConfigError(f"--workdir {workdir}: {error.strerror}") from error
        self._title = f"{config.arch} on {config.dataset}"
        self._drawing_seconds, self._drawn = 0.0, len(records)
        super().__init__(config.epochs, facts | {"workdir": os.fspath(workdir)})

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Completes the files, and prints the table at the end of a run that went well."""
        self._draw()
        super().__exit__(kind)
        with contextlib.suppress(OSError):  # The failure to write has been reported.
            self._tensorboard.close()
            self._metrics.close()
        if kind is None:
            seconds = time.perf_counter() - self._start
            self.summary(self.records, self._before, seconds, self._workdir)

    def epoch(self, record: EpochRecord) -> None:
        """Writes the record and shows it, and redraws the plots unless that was done lately.

        Raises:
          SaveError: if it cannot be written.
        """
        self.records.append(record)
        try:
            self._metrics.write(_line(record))
            self._metrics.flush()
            self._tensorboard.write(record)
        except OSError as error:
            raise SaveError(f"cannot write in {self._workdir}: {error.strerror}") from error
        super().epoch(record)
        if self._drawing_seconds <= DRAWING_SHARE * (time.perf_counter() - self._start):
            self._draw()

    def _draw(self) -> None:
        """Plots the records, if there are new ones."""
        if self._drawn == len(self.records):
            return
        start = time.perf_counter()
        from training.reporting.curves import draw

        path = self._workdir / CURVES_FILE
        try:
            draw(self.records, self._title, path)
        except OSError as error:
            log.warning("cannot draw %s: %s", path, error.strerror)
        self._drawn = len(self.records)
        self._drawing_seconds += time.perf_counter() - start


@contextlib.contextmanager
def _hidden(module: str) -> Iterator[None]:
    """Has imports of a module fail, unless it has been imported before."""
    loaded = module in sys.modules
    if not loaded:
        sys.modules[module] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        if not loaded:
            del sys.modules[module]


def _line(record: EpochRecord) -> bytes:
    return (json.dumps(record.to_json()) + "\n").encode()
