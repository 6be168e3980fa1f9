"""Folders in a bucket of Google Cloud Storage, named as ``gs://bucket/folder``.

``etils.epath`` reads and writes them through gcsfs, the extra ``gcs``. What differs from a disk: an
object appears whole or not at all, but is never appended to; a folder is where objects are, and to
rename it is to copy and delete these; nothing can be locked.
"""

import contextlib
import errno
import importlib.util
import logging
import os
import re
from collections.abc import Iterator
from pathlib import Path

from etils import epath

from input_pipeline.errors import DataError

# What it logs of a failure, at length, is said in one line of our own.
logging.getLogger("gcsfs").setLevel(logging.CRITICAL)


def is_remote(path: epath.PathLike) -> bool:
    """Returns whether a path names no folder or file of this machine's."""
    return "://" in os.fspath(path)


def absolute(path: epath.PathLike) -> str:
    """Returns the whole name of a path, which a remote one always has."""
    return os.fspath(path) if is_remote(path) else str(Path(path).absolute())


def obstacle(path: epath.PathLike) -> str:
    """Returns why this program cannot use a path that is remote, else an empty string."""
    if not is_remote(path):
        return ""
    if not re.match("gs://[^/]", os.fspath(path)):
        return "is no folder, and not in a bucket either, as gs://bucket/folder"
    if importlib.util.find_spec("gcsfs") is None:
        return "a bucket needs the extra gcs: `./run install gcs`"
    return ""


@contextlib.contextmanager
def failing_as_files_do(path: epath.PathLike) -> Iterator[None]:
    """Raises OSError for whatever the clients of a bucket raise, which are many."""
    try:
        yield
    except DataError:
        raise
    except FileNotFoundError as error:
        if not is_remote(path):
            raise
        raise FileNotFoundError(errno.ENOENT, "no such bucket, or object in it") from error
    except Exception as error:
        if not is_remote(path):
            raise
        said = getattr(error, "strerror", None) or str(error) or type(error).__name__
        raise OSError(errno.EIO, said.splitlines()[0]) from error
