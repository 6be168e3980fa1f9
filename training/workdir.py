"""The folder of a run: chosen and checked at the start, made when there is something to keep."""

import itertools
import os
import time
from pathlib import Path

from training.config import ConfigError, TrainConfig

CONFIG_FILE = "config.json"
METRICS_FILE = "metrics.jsonl"
CURVES_FILE = "curves.png"


def choose(config: TrainConfig) -> Path:
    """Returns the folder that a run is to use, without making it.

    Raises:
      ConfigError: if it cannot be made or written, or holds a run already.
    """
    path = config.workdir.expanduser() if config.workdir else _fresh(config)
    if (path / CONFIG_FILE).exists():
        raise ConfigError(f"--workdir {path}: holds an earlier run; give a new folder")
    ancestor = next(p for p in (path, *path.absolute().parents) if p.exists())
    if not ancestor.is_dir() or not os.access(ancestor, os.W_OK | os.X_OK):
        raise ConfigError(
            f"--workdir {path}: cannot write in {ancestor}; give a folder that can be"
        )
    return path


def _fresh(config: TrainConfig) -> Path:
    """A name by the second, numbered where runs start within one."""
    name = f"{config.dataset}-{config.arch}-{time.strftime('%Y%m%d-%H%M%S')}"
    names = itertools.chain([name], (f"{name}-{i}" for i in itertools.count(2)))
    return next(path for path in map(Path("runs").joinpath, names) if not path.exists())
