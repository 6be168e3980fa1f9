"""What several tests need of a run."""

import dataclasses
import functools
import json
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np

import models
from models import resnet

ROOT = Path(__file__).parent.parent


STARTED = []


def start(*command, **kwargs):
    """Starts Python with this command line; what it writes is for :func:`finish`.

    It is killed when the test ends, if it is still running.
    """
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen([sys.executable, *map(str, command)], **pipes, **kwargs)
    STARTED.append(process)
    return process


def finish(process, timeout=120):
    """What it wrote to standard output and to standard error, and its exit code."""
    return *process.communicate(timeout=timeout), process.returncode


def free_address():
    """An address of this machine at which nobody listens."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{s.getsockname()[1]}"


def same(a, b):
    """Whether two trees have the same arrays, to the last bit."""
    return all(map(np.array_equal, jax.tree.leaves(a), jax.tree.leaves(b)))


def untimed(records):
    """The records of epochs without what a clock measured."""
    return [dataclasses.replace(r, seconds=0, images_per_second=0) for r in records]


def read_records(workdir):
    """The lines of ``metrics.jsonl``."""
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def wait_for_epochs(workdir, epochs=1):
    """Waits until a run has written so many lines."""
    file = workdir / "metrics.jsonl"
    deadline = time.monotonic() + 300
    while not (file.exists() and file.read_text().count("\n") >= epochs):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def small_resnet18(monkeypatch):
    """Makes resnet18 a network of two blocks, 8 channels wide, which compiles much sooner."""
    monkeypatch.setitem(resnet.STAGES, 18, (False, (1, 1)))
    monkeypatch.setattr(models, "create", functools.partial(models.create, width=8))
