"""The folder of a run: chosen and checked at the start, locked while the run uses it."""

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
    """Returns the folder for a run, without creating it.

    Raises:
      ConfigError: if it cannot be created or written.
    """
    try:
        path = config.workdir.expanduser() if config.workdir else _fresh(config)
        ancestor = next(p for p in (path, *path.absolute().parents) if p.exists())
    except (OSError, RuntimeError) as error:  # The name is too long, or `~user` is unknown.
        reason = error.strerror if isinstance(error, OSError) else error
        raise ConfigError(f"--workdir {config.workdir}: {reason}") from error
    if not ancestor.is_dir() or not os.access(ancestor, os.W_OK | os.X_OK):
        raise ConfigError(
            f"--workdir {path}: cannot write in {ancestor}; give a folder that can be"
        )
    return path


def _fresh(config: TrainConfig) -> Path:
    """Returns a folder named by the current second, numbered if that name is taken."""
    name = f"{config.dataset}-{config.arch}-{_now()}"
    return unused(Path("runs") / name)


def _now() -> str:
    return time.strftime("%Y%m%d-%H%M%S")


def unused(path: Path) -> Path:
    """Returns the path, with a number appended if it exists already."""
    names = itertools.chain([path.name], (f"{path.name}-{i}" for i in itertools.count(2)))
    return next(path for path in map(path.with_name, names) if not path.exists())


@contextlib.contextmanager
def held(path: Path, restart: bool) -> Iterator[str]:
    """Creates the folder, and locks it against other runs.

    The files of an earlier run are moved into a subfolder of their own if ``restart`` is set, or if
    that run recorded epochs but left no checkpoint to resume from.

    Args:
      path: the path of the folder.
      restart: whether to start from the beginning.

    Yields:
      The folder that the earlier run's files were moved to, or an empty string.

    Raises:
      ConfigError: if another run is using the folder, or it cannot be created.
    """
    import filelock

    lock = filelock.FileLock(path / LOCK_FILE)
    try:
        path.mkdir(parents=True, exist_ok=True)
        # The system releases the lock when the process ends, however it ends.
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
