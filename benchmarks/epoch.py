"""Seconds per epoch of CIFAR-10, against the same training in PyTorch.

    python benchmarks/epoch.py --arch resnet18 --data_dir DIR

on a CPU or, where JAX has one, on a GPU, with `--precision bf16` in bfloat16 on both sides. It

first takes a few steps of both from the same weights on the same batches, and prints their losses.
Then both take turns, several times, after warm-up:

- `epoch`: all that training does, from uint8 images in memory to the next weights: here
  :class:`training.feeds.resident.ResidentFeed`, there `pytorch_peer.py` with its DataLoader. With
  `--steps` it is so many steps, and the seconds are scaled to an epoch;
- `step`: a step on one batch, which both have in memory.

Ratios are medians of those within a turn, since machines vary. Last, what share of the machine's
peak, as matrix products reach it in the same run, the arithmetic of a step amounts to: that of
direct convolutions, on both sides. With `--profile DIR`, on a GPU, also which kernels take the time
of our epoch; the trace is left in `DIR`.
"""

import collections
import dataclasses
import gzip
import itertools
import json
import math
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from flax import nnx

sys.path.insert(0, os.fspath(Path(__file__).parent.parent))
from benchmarks import pytorch_peer
from benchmarks.ours import Ours
from input_pipeline.batch import Batch, normalise

# Our names of parameters, in the order in which the peer has them.
RANK = {"stem": 0, "layers": 1, "convs": 1, "blocks": 1, "shortcut": 2, "head": 2, "kernel": 0}


@dataclasses.dataclass(frozen=True)
class Options:
    """Times training on CIFAR-10 side by side with PyTorch's."""

    data_dir: str | None = None
    """Where TensorFlow Datasets keeps its data."""
    arch: str = "fcn"
    """fcn, of depth 10 and width 256, vgg16 or resnet18."""
    batch_size: int = 128
    """Images in a batch."""
    steps: int | None = None
    """Times so many steps instead of whole epochs."""
    turns: int = 3
    """How often each is timed."""
    checked: int = 10
    """Steps whose losses are compared first."""
    precision: Literal["f32", "bf16"] = "f32"
    """Of products and convolutions."""
    profile: Path | None = None
    """A folder for a trace of our steps, which is summed up by kernel."""
    threads: int = 2
    """Of PyTorch's operations."""
    workers: int = 2
    """Processes of its DataLoader."""


def build_peer(options: Options, ours: Ours) -> pytorch_peer.Peer:
    """The peer, on the same images and from the weights that ours has now."""
    import torch

    peer = pytorch_peer.build(
        options.arch,
        ours.spec,
        *ours.data.train,
        options.batch_size,
        threads=options.threads,
        workers=options.workers,
        device="cuda" if jax.default_backend() == "gpu" else "cpu",
        bfloat16=options.precision == "bf16",
    )
    with torch.no_grad():
        weights = as_pytorch(ours.state.params, ours.spec.image_shape)
        for parameter, weight in zip(peer.network.parameters(), weights, strict=True):
            parameter.copy_(torch.from_numpy(weight))
    return peer


def as_pytorch(params, image_shape: tuple[int, int, int]) -> list[np.ndarray]:
    """Our parameters in the peer's order, each with its axes in PyTorch's."""
    paths = jax.tree.leaves_with_path(nnx.to_pure_dict(params))
    rank = lambda path_and_leaf: [RANK.get(k.key, k.key) for k in path_and_leaf[0]]
    found = []
    for _, leaf in sorted(paths, key=rank):
        leaf = np.asarray(leaf)
        if leaf.ndim == 4:
            found.append(leaf.transpose(3, 2, 0, 1).copy())
        elif leaf.shape[0] == math.prod(image_shape):
            # PyTorch flattens images with their channels first.
            pixels = leaf.reshape(*image_shape, -1).transpose(3, 2, 0, 1)
            found.append(pixels.reshape(leaf.shape[::-1]).copy())
        else:
            found.append(leaf.T.copy())
    return found


def main(options: Options) -> None:
    """Prints the tables of ``benchmarks/RESULTS.md``."""
    if options.arch not in pytorch_peer.NETWORKS:
        sys.exit(f"error: --arch must be one of {', '.join(pytorch_peer.NETWORKS)}")
    ours = Ours(options.arch, options.batch_size, options.data_dir, options.precision)
    peer = build_peer(options, ours)
    check(options, ours, peer)
    times(options, ours, peer)
    if options.profile:
        ours.train(options.steps or ours.feed.steps_per_epoch)
        with jax.profiler.trace(options.profile):
            ours.train(options.steps or ours.feed.steps_per_epoch)
        print_kernels(options.profile)


def batches(options: Options, ours: Ours, index: int) -> tuple[Batch, tuple]:
    """A batch of the first images, as they are, for us and for the peer."""
    import torch

    chosen = slice(index * options.batch_size, (index + 1) * options.batch_size)
    train = ours.data.train
    images = normalise(ours.spec, jnp.asarray(train.images[chosen]), jnp.float32)
    labels = np.array(train.labels[chosen])
    batch = Batch(images, jnp.asarray(labels), jnp.ones(len(labels)))
    channels_first = np.array(images).transpose(0, 3, 1, 2).copy()
    return batch, (torch.from_numpy(channels_first), torch.from_numpy(labels).long())


def check(options: Options, ours: Ours, peer: pytorch_peer.Peer) -> None:
    """Prints the losses of both over the same steps."""
    print(f"\nlosses of {options.arch} from the same weights on the same batches")
    print("step        ours        peer   relative difference")
    for number in range(options.checked):
        batch, theirs = batches(options, ours, number)
        loss, other = ours.step(batch), peer.step(*theirs).item()
        print(f"{number:4d}  {loss:10.6f}  {other:10.6f}   {abs(loss - other) / other:.1e}")


def times(options: Options, ours: Ours, peer: pytorch_peer.Peer) -> None:
    """Prints seconds and ratios."""
    per_epoch = ours.feed.steps_per_epoch
    steps = min(options.steps or per_epoch, per_epoch)
    batch, theirs = batches(options, ours, 0)
    tasks = {
        ("epoch", "ours"): lambda: ours.train(steps),
        ("epoch", "peer"): lambda: peer.train(steps),
        ("step", "ours"): lambda: ours.step(batch),
        ("step", "peer"): lambda: peer.step(*theirs).item(),
    }
    scales = {"epoch": per_epoch / steps, "step": 1}
    for task in tasks.values():
        task()
    seconds = {key: [] for key in tasks}
    peaks = []
    for _ in range(options.turns):
        for key, task in tasks.items():
            repeats = 1 if key[0] == "epoch" else 3
            seconds[key].append(scales[key[0]] * min(timed(task) for _ in range(repeats)))
        peaks.append(peak(jnp.bfloat16 if options.precision == "bf16" else jnp.float32))
    part = "" if steps == per_epoch else f", of which {steps} were taken"
    print(f"\n{options.arch}, batches of {options.batch_size}, {per_epoch} steps an epoch{part}")
    print("             ours        peer   ours is so many times as fast")
    for what in scales:
        mine, other = seconds[what, "ours"], seconds[what, "peer"]
        ratios = [b / a for a, b in zip(mine, other, strict=True)]
        print(
            f"{what:6s} {statistics.median(mine):8.4f} s  {statistics.median(other):8.4f} s   "
            f"{statistics.median(ratios):.2f} ({min(ratios):.2f}-{max(ratios):.2f})"
        )
    work, rate = peer.flops(*theirs), statistics.median(peaks)
    print(f"matrix products: {rate / 1e9:.0f} GFLOP/s; a step: {work / 1e9:.1f} GFLOP, which is")
    for side in ("ours", "peer"):
        share = work / statistics.median(seconds["step", side]) / rate
        print(f"{side}: {share:.0%} of that rate")


def print_kernels(folder: Path) -> None:
    """Prints the share of a GPU's time that each of its kernels takes, by their XLA operation."""
    (file,) = folder.rglob("*.trace.json.gz")
    events = json.loads(gzip.decompress(file.read_bytes()))["traceEvents"]
    names = {e["pid"]: e["args"]["name"] for e in events if e.get("name") == "process_name"}
    microseconds = collections.Counter()
    for event in events:
        args = event.get("args", {})
        if names.get(event.get("pid"), "").startswith("/device:") and "hlo_op" in args:
            microseconds[event["name"]] += event["dur"]
    total = sum(microseconds.values())
    print(f"\nkernels of our steps, {total / 1e6:.3f} s in all")
    for name, spent in microseconds.most_common(20):
        print(f"{spent / total:6.1%}  {name[:100]}")


def timed(task: Callable[[], object]) -> float:
    """Seconds that it takes."""
    start = time.perf_counter()
    task()
    return time.perf_counter() - start


def peak(dtype: jnp.dtype) -> float:
    """The best rate of a few matrix products, in floating-point operations a second."""
    product, rates = jax.jit(jnp.dot), []
    sizes = (8192,) if jax.default_backend() == "gpu" else (512, 1024, 2048)
    for size, _ in itertools.product(sizes, range(4)):
        a = jax.random.normal(jax.random.key(0), (size, size), dtype)
        jax.block_until_ready(product(a, a))
        rates.append(2 * size**3 / timed(lambda a=a: jax.block_until_ready(product(a, a))))
    return max(rates)


if __name__ == "__main__":
    main(tyro.cli(Options, use_underscores=True))
