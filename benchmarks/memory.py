"""How much memory training takes at its peak, against the same training in PyTorch.

    python benchmarks/memory.py --data_dir DIR

takes a few steps of each in a process of its own, and asks the system how large that has been. Both
hold CIFAR-10 in memory, and the peer loads it in its own process.
"""

import dataclasses
import os
import resource
import subprocess
import sys
from pathlib import Path

import tyro

sys.path.insert(0, os.fspath(Path(__file__).parent.parent))
from input_pipeline import resident
from input_pipeline.specs import SPECS

STEPS = 3


@dataclasses.dataclass(frozen=True)
class Options:
    """Measures the memory of training on CIFAR-10."""

    data_dir: str | None = None
    """Where TensorFlow Datasets keeps its data."""
    arch: str = "resnet18"
    """fcn, vgg16 or resnet18."""
    batch_size: int = 128
    """Images in a batch."""


def main(options: Options) -> None:
    """Prints megabytes and their ratio."""
    ours, peer = (in_new_process(side) for side in ("ours", "peer"))
    print(f"peak resident size, {options.arch}, batches of {options.batch_size}")
    print(f"ours {ours:.0f} MB, peer {peer:.0f} MB: {ours / peer:.2f} times")


def in_new_process(side: str) -> float:
    """:func:`train` with the flags of this process, in another."""
    command = [sys.executable, __file__, side, *sys.argv[1:]]
    run = subprocess.run(command, capture_output=True, text=True)
    if run.returncode:
        sys.exit(run.stderr)
    return float(run.stdout.splitlines()[-1])


def train(side: str, options: Options) -> float:
    """Takes a few steps; returns the peak resident size of this process in MB."""
    # Each imports its own framework alone.
    if side == "ours":
        from benchmarks.ours import Ours

        run = Ours(options.arch, options.batch_size, options.data_dir)
    else:
        from benchmarks import pytorch_peer

        spec = SPECS["cifar10"]
        train = resident.load(spec, options.data_dir).train
        run = pytorch_peer.build(
            options.arch, spec, *train, options.batch_size, threads=2, workers=0
        )
    run.train(STEPS)
    # Linux counts in kB.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1000


if __name__ == "__main__":
    if sys.argv[1:2] in (["ours"], ["peer"]):
        print(train(sys.argv.pop(1), tyro.cli(Options, use_underscores=True)))
    else:
        main(tyro.cli(Options, use_underscores=True))
