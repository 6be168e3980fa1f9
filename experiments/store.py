"""The finished runs: a line of JSON for each, in a file that only grows."""

from __future__ import annotations

import json
import os
import zlib
from pathlib import Path
from typing import Any

from filelock import FileLock


class Store:
    """Finished runs by their keys. Several commands may add to one file at a time."""

    def __init__(self, path: Path):
        """Names the file, which need not exist."""
        self.path = path

    def read(self) -> dict[str, dict[str, Any]]:
        """Returns the runs by :func:`name`. A line that was cut off, as by a kill, is left out."""
        runs = {}
        if self.path.exists():
            for line in self.path.read_text().splitlines():
                try:
                    run = json.loads(line)
                except ValueError:
                    continue
                runs[name(run["key"])] = run
        return runs

    def add(self, run: dict[str, Any]) -> None:
        """Adds a run, which has its ``key``."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        # A newline first, in case a line before was cut off. The system appends it as a whole.
        line = f"\n{json.dumps(run)}\n".encode()
        file = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            os.write(file, line)
        finally:
            os.close(file)

    def lock(self, what: str) -> FileLock:
        """Returns the lock of a part of the runs, for one command at a time to take them."""
        folder = self.path.parent / "locks"
        folder.mkdir(parents=True, exist_ok=True)
        return FileLock(folder / f"{zlib.crc32(what.encode()):08x}.lock")


def name(key: dict[str, Any]) -> str:
    """Returns the key as text that does not depend on the order of its fields."""
    return json.dumps(key, sort_keys=True)
