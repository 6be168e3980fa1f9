"""The folder of a run: chosen and checked at the start, held while there is something to keep."""

import contextlib
import itertools
import os
import time
from collections.abc import Iterator
from pathlib import Path

from training.config import TrainConfig
from training.errors import ConfigError

CONFIG_FILE = "config.json"
METRICS_FILE = "metrics.jsonl"
CURVES_FILE = "curves.png"
CHECKPOINTS = "checkpoints"
LOCK_FILE = ".lock"
EARLIER = "earlier"


def choose(config: TrainConfig) -> Path:
    """Returns the folder that a run is to use, without making it.

    Raises:
      ConfigError: if it cannot be made or written.
    """
    try:
        path = config.workdir.expanduser() if config.workdir else _fresh(config)
        ancestor = next(p for p in (path, *path.absolute().parents) if p.exists())
    except (OSError, RuntimeError) as error:  # A name too long, or a user that is none.
        reason = error.strerror if isinstance(error, OSError) else error
        raise ConfigError(f"--workdir {config.workdir}: {reason}") from error
    if not ancestor.is_dir() or not os.access(ancestor, os.W_OK | os.X_OK):
        raise ConfigError(
            f"--workdir {path}: cannot write in {ancestor}; give a folder that can be"
        )
    return path


def _fresh(config: TrainConfig) -> Path:
    """A name by the second, numbered where runs start within one."""
    name = f"{config.dataset}-{config.arch}-{_now()}"
    return unused(Path("runs") / name)


def _now() -> str:
    return time.strftime("%Y%m%d-%H%M%S")


def unused(path: Path) -> Path:
    """The path, numbered if there is something there already."""
    names = itertools.chain([path.name], (f"{path.name}-{i}" for i in itertools.count(2)))
    return next(path for path in map(path.with_name, names) if not path.exists())


@contextlib.contextmanager
def held(path: Path, restart: bool) -> Iterator[str]:
    """Makes the folder, and keeps every other run out of it.

    What an earlier run has left is moved into a folder of its own beside the new run's files, if
    it is to begin afresh, or if that run had epochs but no checkpoint to go on from.

    Args:
      path: of the folder.
      restart: whether to begin afresh.

    Yields:
      Where the earlier run's files have been moved, or nothing.

    Raises:
      ConfigError: if another run is using it, or it cannot be made.
    """
    import filelock

    lock = filelock.FileLock(path / LOCK_FILE)
    try:
        path.mkdir(parents=True, exist_ok=True)
        # The system lets go of it when the process ends, however it does.
        lock.acquire(blocking=False)
    except filelock.Timeout as error:
        raise ConfigError(f"--workdir {path}: another run is using it; give another") from error
    except OSError as error:
        raise ConfigError(f"--workdir {path}: {error.strerror}") from error
    try:
        yield _set_aside(path) if restart or _has_only_metrics(path) else ""
    finally:
        lock.release()


def _has_only_metrics(path: Path) -> bool:
    file = path / METRICS_FILE
    has_epochs = file.exists() and file.stat().st_size > 0
    saved = (p for p in path.glob(f"{CHECKPOINTS}/*") if p.name.isdigit())
    return has_epochs and not any(saved)


def _set_aside(path: Path) -> str:
    names = (CONFIG_FILE, METRICS_FILE, CURVES_FILE, CHECKPOINTS, "events.out.tfevents.*")
    left = [found for name in names for found in path.glob(name)]
    if not left:
        return ""
    aside = unused(path / f"{EARLIER}-{_now()}")
    aside.mkdir()
    for file in left:
        file.rename(aside / file.name)
    return os.fspath(aside)
