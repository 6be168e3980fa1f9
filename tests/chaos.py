"""Kills training with SIGKILL at random moments, and looks whether it made any difference.

    python tests/chaos.py

trains fcn on digits, and on images that are streamed, once in peace; then fifty and three times
more with ``kill -9`` in between, each time started again with the same command; and compares
parameters and metrics to the last bit. Not in the default suite: it takes a quarter of an hour. The
suite does some of it, in ``tests/training/test_resuming.py``.
"""

import dataclasses
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import numpy as np
import tyro

ROOT = Path(__file__).parent.parent
sys.path.insert(0, os.fspath(ROOT))

from flax import nnx  # noqa: E402

from tests.images import write_tree  # noqa: E402
from training import checkpoints  # noqa: E402

TIMINGS = {"seconds", "images_per_second"}
RESIDENT = "--platform cpu --epochs 40 --depth 4 --width 64 --save_every 5steps"
STREAMED = (
    "--platform cpu --epochs 6 --depth 2 --width 16 --save_every 2steps --dataset imagenet "
    "--image_size 16 --train_bs 5 --test_bs 4 --workers 1"
)


@dataclasses.dataclass(frozen=True)
class Options:
    """Kills training at random moments, and compares how it ends."""

    resident: int = 50
    """Runs of fcn on digits."""
    streamed: int = 3
    """Runs on images that are streamed."""
    kills: int = 4
    """The most that a run is killed."""
    seed: int = 0
    """Of the moments."""


def main(options: Options) -> int:
    """Returns the number of runs that ended otherwise than in peace."""
    rng, different = random.Random(options.seed), 0
    with tempfile.TemporaryDirectory() as folder:
        tree = write_tree(Path(folder) / "imagenet", train=43, test=10)
        cases = {
            "resident": (RESIDENT.split(), options.resident),
            "streamed": ([*STREAMED.split(), "--data_dir", os.fspath(tree)], options.streamed),
        }
        for name, (flags, runs) in cases.items():
            kills, same = chaos(Path(folder) / name, flags, runs, options.kills, rng)
            moments = ", ".join(f"{count} {moment}" for moment, count in sorted(kills.items()))
            print(f"{name}: {sum(kills.values())} kills ({moments})")
            print(f"{name}: {same} of {runs} runs ended as if nothing had happened", flush=True)
            different += runs - same
    return different


def chaos(
    folder: Path, flags: list[str], runs: int, kills: int, rng: random.Random
) -> tuple[Counter, int]:
    """Compares runs that are killed with one that is not.

    Args:
      folder: for their workdirs.
      flags: of ``train.py``, without ``--workdir``.
      runs: how many are killed.
      kills: how often each is, unless it ends before.
      rng: for the moments.

    Returns:
      How often there was something under way when a run was killed, and how many ended the same.
    """
    # The first run fills the caches, the second says how long one takes.
    for name in ("first", "peace"):
        start = time.monotonic()
        assert _train(folder / name, flags).wait() == 0
        seconds = time.monotonic() - start
    expected, moments, same = ending(folder / "peace"), Counter(), 0
    for i in range(runs):
        workdir = folder / str(i)
        for kill in range(kills):
            process = _train(workdir, flags)
            try:
                # The first time soon, as the machine may have become quicker meanwhile.
                process.wait(rng.uniform(0, seconds if kill else seconds / 2))
                break
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
                moments[_moment(workdir)] += 1
        else:
            assert _train(workdir, flags).wait() == 0
        same += ending(workdir) == expected
    return moments, same


def ending(workdir: Path) -> tuple[bytes, list[dict]]:
    """The last parameters of a run, and its metrics without what was timed."""
    model, _ = checkpoints.load(workdir, "last")
    arrays = nnx.to_flat_state(nnx.state(model))
    parameters = b"".join(np.asarray(leaf[...]).tobytes() for _, leaf in arrays)
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    untimed = [{k: v for k, v in json.loads(line).items() if k not in TIMINGS} for line in lines]
    return parameters, untimed


def _train(workdir: Path, flags: list[str]) -> subprocess.Popen:
    command = [sys.executable, ROOT / "train.py", *flags, "--workdir", workdir]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL)


def _moment(workdir: Path) -> str:
    """What a run was doing when it was killed, as far as its files tell."""
    saves = list((workdir / "checkpoints").glob("*"))
    if not saves:
        return "before anything was saved"
    return "while saving" if any("tmp" in save.name for save in saves) else "between saves"


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Options, use_underscores=True)))
