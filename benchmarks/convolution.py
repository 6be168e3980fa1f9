"""Which form of a convolution is the quickest on this machine, layer by layer.

    python benchmarks/convolution.py

times each form of :mod:`models.cpu_convolution` (of the output, of the input's and of the kernel's
gradient) for the layers of `vgg16`, `resnet18` and `resnet50` on images of 32x32, and prints the
milliseconds of XLA's own and how many times as fast the others are; the one that the rule chooses
has a star. The forms take turns, and the best of several counts.

A whole step has enough to do for all cores at once, also where one convolution alone keeps to one
of them. So it is the processor's time that decides, and that is printed; `--wall` prints the
clock's.
"""

import dataclasses
import functools
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

import jax
import tyro

sys.path.insert(0, os.fspath(Path(__file__).parent.parent))
from models.cpu_convolution import FORMS, Window, form_of

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


def main(options: Options) -> None:
    """Prints a table for each batch size."""
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


if __name__ == "__main__":
    main(tyro.cli(Options, use_underscores=True))
