"""The folder of a run: chosen and checked at the start, locked while the run uses it."""

import contextlib
import itertools
import os
import secrets
import socket
import time
from collections.abc import Iterator
from pathlib import Path

from etils import epath

from input_pipeline import cloud
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


def choose(config: TrainConfig) -> epath.Path:
    """Returns the folder for a run, without creating it.

    Raises:
      ConfigError: if it cannot be created or written, of which in a bucket only :func:`held` knows,
        or if checkpoints in a folder of that name could not be found again.
    """
    if config.workdir is not None and cloud.is_remote(config.workdir):
        return _no_pattern(epath.Path(config.workdir))
    path = _expanded(config.workdir, "--workdir ") if config.workdir else _fresh(config)
    with _explained(epath.Path(path)):
        ancestor = next(p for p in (path, *path.absolute().parents) if p.exists())
    if not ancestor.is_dir() or not os.access(ancestor, os.W_OK | os.X_OK):
        raise ConfigError(
            f"--workdir {path}: cannot write in {ancestor}; give a folder that can be"
        )
    return _no_pattern(epath.Path(path))


def located(path: epath.PathLike) -> epath.Path:
    """Returns the folder of an earlier run by its name.

    Raises:
      ConfigError: if it is in a bucket that cannot be used, cannot be looked into, or has a name
        that :func:`choose` refuses.
    """
    if reason := cloud.obstacle(path):
        raise ConfigError(f"{path}: {reason}")
    if cloud.is_remote(path):
        return _no_pattern(epath.Path(path))
    folder = _expanded(path)
    try:
        folder.stat()
    except FileNotFoundError:
        pass
    except OSError as error:
        raise ConfigError(f"{folder}: {error.strerror}") from error
    return _no_pattern(epath.Path(folder))


def _expanded(path: epath.PathLike, flag: str = "") -> Path:
    """Returns the path with ``~`` or ``~user`` in full; raises ConfigError if that is unknown."""
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        raise ConfigError(f"{flag}{path}: the home folder of that user is unknown") from error


def _no_pattern(path: epath.Path) -> epath.Path:
    """Returns the path; raises ConfigError if Orbax would take it for a pattern of names."""
    if found := sorted(set("*?[").intersection(cloud.absolute(path))):
        raise ConfigError(
            f"{path}: has {' and '.join(found)} in its name or above it, which Orbax takes for a "
            "pattern, and would not find what it saves; give another folder"
        )
    return path


def _fresh(config: TrainConfig) -> Path:
    """Returns a folder named by the current second, numbered if that name is taken."""
    name = f"{config.dataset}-{config.arch}-{_now()}"
    return Path(unused(epath.Path("runs") / name))


def _now() -> str:
    return time.strftime("%Y%m%d-%H%M%S")


@contextlib.contextmanager
def _explained(path: epath.Path) -> Iterator[None]:
    """Raises ConfigError, which names the folder, for what the system or a bucket refuses."""
    try:
        with cloud.failing_as_files_do(path):
            yield
    except OSError as error:
        raise ConfigError(f"--workdir {path}: {error.strerror}") from error


def unused(path: epath.Path) -> epath.Path:
    """Returns the path, with a number appended if it exists already."""
    names = itertools.chain([path.name], (f"{path.name}-{i}" for i in itertools.count(2)))
    return next(path for path in map(path.with_name, names) if not path.exists())


@contextlib.contextmanager
def held(path: epath.Path) -> Iterator[None]:
    """Creates the folder, and locks it against other runs, which a bucket cannot be.

    Raises:
      ConfigError: if another run is using the folder, or it cannot be created or written.
    """
    if cloud.is_remote(path):
        with token(path) as name:
            find_token(path, name)
        yield
        return
    import filelock

    lock = filelock.FileLock(path / LOCK_FILE)
    with _explained(path):
        path.mkdir(parents=True, exist_ok=True)
        try:
            # The system releases the lock when the process ends, however it ends.
            lock.acquire(blocking=False)
        except filelock.Timeout as error:
            raise ConfigError(f"--workdir {path}: another run is using it; give another") from error
    try:
        yield
    finally:
        lock.release()


@contextlib.contextmanager
def token(path: epath.Path) -> Iterator[str]:
    """Leaves a file in the folder for as long as others look for it by :func:`find_token`.

    Yields:
      The name of the file, which no other has ever had.

    Raises:
      ConfigError: if it cannot be written.
    """
    file = path / f".token-{secrets.token_hex(8)}"
    with _explained(path):
        write(file, b"")
    try:
        yield file.name
    finally:
        with contextlib.suppress(OSError), cloud.failing_as_files_do(file):
            file.unlink()


def find_token(path: epath.Path, name: str) -> None:
    """Raises ConfigError if this process does not find in the folder what process 0 left there."""

    def found() -> bool:
        with _explained(path):
            return (path / name).exists()

    deadline = time.monotonic() + SEEN_SECONDS
    while not found():
        if time.monotonic() > deadline:
            raise ConfigError(
                f"--workdir {path}: on {socket.gethostname()} this is not the folder that process "
                "0 writes in; give one that all processes share"
            )
        time.sleep(0.1)


def set_aside(path: epath.Path, restart: bool) -> str:
    """Moves an earlier run's files into a subfolder of their own, if this run does not resume it.

    It does not if ``restart`` is set, or if that run recorded epochs but left no checkpoint.

    Returns:
      The folder that they were moved to, or an empty string.

    Raises:
      ConfigError: if they cannot be moved.
    """
    with _explained(path):
        return _set_aside(path) if restart or _has_only_metrics(path) else ""


def _set_aside(path: epath.Path) -> str:
    names = (CONFIG_FILE, METRICS_FILE, CURVES_FILE, CHECKPOINTS, "events.out.tfevents.*")
    left = [found for name in names for found in path.glob(name)]
    if not left:
        return ""
    aside = unused(path / f"{EARLIER}-{_now()}")
    if cloud.is_remote(path):
        # Else it would be no folder, into which epath could move.
        write(aside / ".folder", b"")
    else:
        aside.mkdir()
    for file in left:
        file.rename(aside / file.name)
    return os.fspath(aside)


def _has_only_metrics(path: epath.Path) -> bool:
    file = path / METRICS_FILE
    return file.exists() and file.read_bytes() != b"" and not saved_steps(path)


def saved_steps(path: epath.Path) -> list[int]:
    """Returns the steps of the checkpoints that have been written to their end."""
    import orbax.checkpoint as ocp

    steps: list[int] = ocp.utils.checkpoint_steps(path / CHECKPOINTS)
    return steps


def write(path: epath.Path, data: bytes) -> None:
    """Writes a file whole or not at all.

    Raises:
      OSError: if it cannot be written.
    """
    if cloud.is_remote(path):
        with cloud.failing_as_files_do(path):
            path.write_bytes(data)
        return
    partial = path.with_name(path.name + ".partial")
    partial.write_bytes(data)
    os.replace(partial, path)


class RewrittenFile:
    """A file in a bucket, which each flush writes whole, as nothing can be appended to it."""

    def __init__(self, path: epath.PathLike, content: bytes = b""):
        self._path, self._content = epath.Path(path), content

    def write(self, data: bytes) -> None:
        """Appends, as far as the next flush is concerned."""
        self._content += data

    def flush(self) -> None:
        """Writes it; raises OSError if it cannot be written."""
        write(self._path, self._content)

    def close(self) -> None:
        """Does what :meth:`flush` does."""
        self.flush()
