"""The folder of a run: chosen and checked at the start, locked while the run uses it."""

import contextlib
import itertools
import os
import secrets
import socket
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

# A network's file system may show a new file a moment late.
SEEN_SECONDS = 10


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
def held(path: Path) -> Iterator[None]:
    """Creates the folder, and locks it against other runs.

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
        yield
    finally:
        lock.release()


@contextlib.contextmanager
def token(path: Path) -> Iterator[str]:
    """Leaves a file in the folder for as long as others look for it by :func:`find_token`.

    Yields:
      The name of the file, which no other has ever had.

    Raises:
      ConfigError: if it cannot be written.
    """
    file = path / f".token-{secrets.token_hex(8)}"
    try:
        file.touch()
    except OSError as error:
        raise ConfigError(f"--workdir {path}: {error.strerror}") from error
    try:
        yield file.name
    finally:
        with contextlib.suppress(OSError):
            file.unlink()


def find_token(path: Path, name: str) -> None:
    """Raises ConfigError if this process does not find in the folder what process 0 left there."""
    deadline = time.monotonic() + SEEN_SECONDS
    while not (path / name).exists():
        if time.monotonic() > deadline:
            raise ConfigError(
                f"--workdir {path}: on {socket.gethostname()} this is not the folder that process "
                "0 writes in; give one that all processes share"
            )
        time.sleep(0.1)


def set_aside(path: Path, restart: bool) -> str:
    """Moves an earlier run's files into a subfolder of their own, if this run does not resume it.

    It does not if ``restart`` is set, or if that run recorded epochs but left no checkpoint.

    Returns:
      The folder that they were moved to, or an empty string.
    """
    if not (restart or _has_only_metrics(path)):
        return ""
    names = (CONFIG_FILE, METRICS_FILE, CURVES_FILE, CHECKPOINTS, "events.out.tfevents.*")
    left = [found for name in names for found in path.glob(name)]
    if not left:
        return ""
    aside = unused(path / f"{EARLIER}-{_now()}")
    aside.mkdir()
    for file in left:
        file.rename(aside / file.name)
    return os.fspath(aside)


def _has_only_metrics(path: Path) -> bool:
    file = path / METRICS_FILE
    has_epochs = file.exists() and file.stat().st_size > 0
    saved = (p for p in path.glob(f"{CHECKPOINTS}/*") if p.name.isdigit())
    return has_epochs and not any(saved)
