"""Which form of a convolution is the quickest on this machine, layer by layer.

    python benchmarks/convolution.py

times each form of :mod:`models.cpu_convolution` (of the output, of the input's and of the kernel's
gradient) for the layers of `vgg16`, `resnet18` and `resnet50` on images of 32x32, and prints the
milliseconds of XLA's own and how many times as fast the others are; the one that the rule chooses
has a star. The forms take turns, and the best of several counts.

A whole step has enough to do for all cores at once, also where one convolution alone keeps to one
of them. So it is the processor's time that decides, and that is printed; `--wall` prints the
clock's.

    python benchmarks/convolution.py --steps vgg16 resnet18

times whole training steps instead, by the clock: as they are, and with the best of the other forms
wherever Winograd's is chosen.
"""

import dataclasses
import functools
import itertools
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import jax
import jax.numpy as jnp
import tyro

sys.path.insert(0, os.fspath(Path(__file__).parent.parent))
from input_pipeline.batch import Batch
from models import cpu_convolution
from models.cpu_convolution import FORMS, Window, form_of
from training import sharding
from training.config import TrainConfig
from training.plan import make_plan

# Side of the map, inputs, outputs, side of the kernel, stride.
LAYERS = (
    (32, 3, 64, 3, 1),
    (32, 64, 64, 3, 1),
    (16, 64, 128, 3, 1),
    (16, 128, 128, 3, 1),
    (8, 128, 256, 3, 1),
    (8, 256, 256, 3, 1),
    (4, 256, 512, 3, 1),
    (4, 512, 512, 3, 1),
    (2, 512, 512, 3, 1),
    (32, 64, 128, 3, 2),
    (16, 128, 256, 3, 2),
    (8, 256, 512, 3, 2),
    (32, 64, 128, 1, 2),
    (16, 128, 256, 1, 2),
    (8, 256, 512, 1, 2),
    (32, 64, 256, 1, 1),
    (32, 256, 64, 1, 1),
    (16, 512, 128, 1, 1),
    (8, 1024, 256, 1, 1),
    (4, 2048, 512, 1, 1),
    (32, 128, 128, 3, 2),
    (32, 256, 512, 1, 2),
)


@dataclasses.dataclass(frozen=True)
class Options:
    """Times each form of each convolution."""

    batch_sizes: tuple[int, ...] = (64, 128)
    """Images in a batch."""
    turns: int = 5
    """How often each is timed."""
    layers: int = len(LAYERS)
    """How many of the layers, from the first."""
    wall: bool = False
    """Whether to go by the clock instead of the processor's time."""
    steps: tuple[str, ...] = ()
    """Networks of which to time whole steps instead."""


def main(options: Options) -> None:
    """Prints a table for each batch size."""
    if options.steps:
        compare_steps(options)
        return
    clock = time.perf_counter if options.wall else time.process_time
    for batch_size in options.batch_sizes:
        print(f"\nbatch {batch_size:3d}: ms of native, and how many times as fast others are")
        print("map   kernel           stride  what       native    taps  winograd")
        for layer in LAYERS[: options.layers]:
            for what in FORMS:
                print(row(layer, what, batch_size, options.turns, clock), flush=True)


def row(
    layer: tuple[int, ...], what: str, batch_size: int, turns: int, clock: Callable[[], float]
) -> str:
    """A line of the table."""
    size, d_in, d_out, taps, stride = layer
    window, kernel_shape = Window(stride, taps // 2), (taps, taps, d_in, d_out)
    chosen = form_of(what, (size, size), kernel_shape, window)
    seconds = measure(what, (batch_size, size, size, d_in), kernel_shape, window, turns, clock)
    star = lambda form: "*" if form == chosen else " "
    others = (
        f"{seconds['native'] / seconds[form]:7.2f}{star(form)}" if form in seconds else " " * 8
        for form in ("taps", "winograd")
    )
    shape = f"{taps}x{taps} {d_in:4d} {d_out:4d}"
    native = f"{seconds['native'] * 1e3:8.2f}{star('native')}"
    return f"{size:3d}   {shape}   {stride:6d}     {what:7s}  {native} {'  '.join(others)}"


def measure(
    what: str,
    x_shape: tuple[int, ...],
    kernel_shape: tuple[int, ...],
    window: Window,
    turns: int,
    clock: Callable[[], float],
) -> dict[str, float]:
    """The least seconds of each form that fits."""
    keys = jax.random.split(jax.random.key(0), 3)
    sides = (window.size(n, kernel_shape[0]) for n in x_shape[1:3])
    operands = [
        jax.random.normal(key, shape)
        for key, shape in zip(
            keys, (x_shape, kernel_shape, (x_shape[0], *sides, kernel_shape[3])), strict=True
        )
    ]
    if what == "output":
        operands.pop()
    programs = {
        form: jax.jit(functools.partial(function, window=window))
        for form, function in FORMS[what].items()
        if form != "winograd" or (kernel_shape[:2], window.stride) == ((3, 3), 1)
    }
    for program in programs.values():
        jax.block_until_ready(program(*operands))
    seconds = dict.fromkeys(programs, float("inf"))
    for _ in range(turns):
        for form, program in programs.items():
            start = clock()
            jax.block_until_ready(program(*operands))
            seconds[form] = min(seconds[form], clock() - start)
    return seconds


def form_without_winograd(what, map_size, kernel_shape, window) -> str:
    """The form that is chosen where Winograd's does not fit, as it never does with a stride."""
    form = form_of(what, map_size, kernel_shape, window)
    if form != "winograd":
        return form
    return form_of(what, map_size, kernel_shape, window._replace(stride=2))


def compare_steps(options: Options) -> None:
    """Prints the seconds and the temporary memory of steps with and without Winograd's form."""
    print("network   batch  without: s, MB     with: s, MB   without / with")
    for arch, batch_size in itertools.product(options.steps, options.batch_sizes):
        without = compiled_step(arch, batch_size, form_without_winograd)
        steps = without, compiled_step(arch, batch_size, form_of)
        memory = [step.memory_analysis().temp_size_in_bytes / 1e6 for step, _ in steps]
        times = [[seconds(*step) for step in steps] for _ in range(options.turns)]
        ratio = statistics.median(a / b for a, b in times)
        medians = map(statistics.median, zip(*times, strict=True))
        columns = (f"{s:6.3f} {mb:8.0f}" for s, mb in zip(medians, memory, strict=True))
        print(f"{arch:9s} {batch_size:5d} {' '.join(columns)}   {ratio:14.2f}", flush=True)


def compiled_step(arch: str, batch_size: int, form: Callable[..., str]) -> tuple:
    """A training step on noise of CIFAR-10's shape, and its arguments."""
    config = TrainConfig(arch=arch, dataset="cifar10", train_bs=batch_size).resolved()
    plan = make_plan(config, sharding.make_mesh(config))
    images = jax.random.normal(jax.random.key(0), (batch_size, *config.spec.image_shape))
    arguments = (
        plan.create_train_state(),
        Batch(images, jnp.arange(batch_size) % config.spec.num_classes, jnp.ones(batch_size)),
    )
    # The form is chosen while a program is lowered, and what is lowered is kept.
    jax.clear_caches()
    with mock.patch.object(cpu_convolution, "form_of", form):
        program = jax.jit(plan.train_step).lower(*arguments).compile()
    jax.block_until_ready(program(*arguments))
    return program, arguments


def seconds(program: Callable, arguments: tuple) -> float:
    """How long a call takes."""
    start = time.perf_counter()
    jax.block_until_ready(program(*arguments))
    return time.perf_counter() - start


if __name__ == "__main__":
    main(tyro.cli(Options, use_underscores=True))
