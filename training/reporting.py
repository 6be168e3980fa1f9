"""What a run shows and leaves: terminal, config, metrics, TensorBoard events, curves."""

import json
import os
import time
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from training.config import ConfigError, TrainConfig
from training.console import Console
from training.workdir import CONFIG_FILE, CURVES_FILE, METRICS_FILE


class Reporter:
    """Writes the files of a run and speaks for it; a context manager around its epochs.

    Attributes:
      records: one dict for each epoch so far.
    """

    def __init__(self, config: TrainConfig, workdir: Path, facts: dict[str, str]):
        """Makes the folder and says what was resolved.

        Args:
          config: of the run, resolved.
          workdir: from :func:`training.workdir.choose`.
          facts: what to say at the start, by name.

        Raises:
          ConfigError: if the folder cannot be written.
        """
        from tensorboardX import SummaryWriter

        self.records: list[dict] = []
        self._workdir = workdir
        self._start = time.perf_counter()
        try:
            workdir.mkdir(parents=True, exist_ok=True)
            (workdir / CONFIG_FILE).write_text(json.dumps(config.to_json(), indent=2) + "\n")
            self._metrics = open(workdir / METRICS_FILE, "w")  # noqa: SIM115, closed in __exit__
            self._tensorboard = SummaryWriter(os.fspath(workdir))
        except OSError as error:
            raise ConfigError(f"--workdir {workdir}: {error.strerror}") from error
        self._curves = CurvesDrawer(workdir / CURVES_FILE, f"{config.arch} on {config.dataset}")
        self._console = Console(config.epochs, facts | {"workdir": os.fspath(workdir)})

    def __enter__(self) -> "Reporter":
        return self

    def __exit__(self, kind, error, traceback) -> None:
        self._metrics.close()
        self._tensorboard.close()
        self._curves.close()
        self._console.close()
        if kind is None:
            self._console.summary(self.records, time.perf_counter() - self._start, self._workdir)

    def begin(self, compile_seconds: float) -> None:
        """Everything is ready for the first epoch."""
        self._console.say(f"compiled in {compile_seconds:.1f} s")
        self._console.begin()

    def progress(self, epoch: int, done: float, averages: dict[str, float]) -> None:
        """Moves the bar.

        Args:
          epoch: the one that is under way, the first being 1.
          done: the share of it that is, 0 to 1.
          averages: over that share: ``loss``, ``accuracy``, ``eta``, ``images_per_second``.
        """
        self._console.progress(epoch, done, averages)

    def epoch(self, record: dict) -> None:
        """Keeps the record of an epoch, in every form."""
        self.records.append(record)
        self._metrics.write(json.dumps(record) + "\n")
        self._metrics.flush()
        for name, value in record.items():
            self._tensorboard.add_scalar(name, value, record["step"])
        self._curves.draw(self.records)
        self._console.epoch(record)


class SilentReporter:
    """Keeps the records, for the processes that another one speaks for."""

    def __init__(self, config: TrainConfig, workdir: Path, facts: dict[str, str]):
        self.records: list[dict] = []

    def __enter__(self) -> "SilentReporter":
        return self

    def __exit__(self, kind, error, traceback) -> None:
        pass

    def begin(self, compile_seconds: float) -> None:
        """Says nothing."""

    def progress(self, epoch: int, done: float, averages: dict[str, float]) -> None:
        """Says nothing."""

    def epoch(self, record: dict) -> None:
        """Keeps the record of an epoch."""
        self.records.append(record)


class CurvesDrawer:
    """Draws in a thread, so that no device waits for a picture.

    Epochs that end while a picture is being drawn share the next one.
    """

    def __init__(self, path: Path, title: str):
        self._path, self._title = path, title
        self._thread = ThreadPoolExecutor(max_workers=1)
        self._drawing: Future | None = None
        self._waiting: list[dict] = []

    def draw(self, records: list[dict]) -> None:
        """Asks for a picture of these records."""
        self._waiting = list(records)
        if self._drawing is None or self._drawing.done():
            self._drawing = self._thread.submit(self._draw)

    def close(self) -> None:
        """Waits until the last picture asked for is there."""
        if self._drawing is not None:
            self._drawing.result()
            self._draw()
        self._thread.shutdown()

    def _draw(self) -> None:
        from training.curves import draw

        while self._waiting:
            records, self._waiting = self._waiting, []
            draw(records, self._title, self._path)
