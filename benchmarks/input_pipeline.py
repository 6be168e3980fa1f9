"""How fast JPEGs become batches, and how long the device waits for them.

    python benchmarks/input_pipeline.py --data_dir DIR

compares, on the same files and with as many processes:

- `ours`: :func:`input_pipeline.streaming.train_stream`, to arrays on the device;
- `torch`: a PyTorch DataLoader whose workers decode with PIL, take a random resized crop, flip and
  make a float tensor, to batches in memory;
- `decode`: simplejpeg decoding each image whole, and nothing else.

All take turns, several times, and the ratios are medians of those within a turn, since machines
vary. What is timed begins after the workers have started. Then: what share of the time a step waits
for its batch, in steps of a ResNet-50 and in steps that do nothing.
"""

import dataclasses
import functools
import itertools
import multiprocessing
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
import numpy as np
import tyro

sys.path.insert(0, os.fspath(Path(__file__).parent.parent))
from input_pipeline import imagenet, jpeg, streaming
from input_pipeline.batch import normalise
from input_pipeline.specs import SPECS
from input_pipeline.streaming import Source
from training import sharding
from training.config import TrainConfig
from training.plan import make_plan
from training.step import LOSSES, train_step

SPEC = SPECS["imagenet"]
SIDE = SPEC.image_shape[0]


@dataclasses.dataclass(frozen=True)
class Options:
    """Times the input pipeline side by side with PyTorch's."""

    data_dir: str
    """ImageNet, or part of it: a folder with train and val, or a TFDS folder."""
    workers: int = 1
    """Processes of each pipeline."""
    batch_size: int = 100
    """Images in a batch."""
    images: int = 1500
    """Images timed in each turn."""
    turns: int = 7
    """How often each is timed."""
    steps: bool = True
    """Whether to time what steps wait for."""


def main(options: Options) -> None:
    """Prints the tables of ``benchmarks/RESULTS.md``."""
    if options.workers < 1 or options.images < options.batch_size:
        sys.exit("error: --workers must be at least 1, and --images at least --batch_size")
    source = imagenet.find(SPEC, options.data_dir).train
    kilobytes, pixels = mean_kilobytes(source), mean_pixels(source)
    print(f"{source.size} images of {kilobytes:.0f} kB and {pixels:,.0f} pixels")
    parts(source)
    pipelines(options, Repeated(source))
    if options.steps:
        waits(options, Repeated(source))


def mean_kilobytes(source: Source) -> float:
    """Of the files."""
    return statistics.mean(len(source[i].data) for i in range(source.size)) / 1000


def mean_pixels(source: Source) -> float:
    """Of the images."""
    headers = (jpeg._baseline_header(source[i].data) for i in range(source.size))
    return statistics.mean(h.height * h.width for h in headers if h)


def parts(source: Source) -> None:
    """Where the time of one image goes, on one core, in milliseconds and of a whole decode."""
    import cv2
    import simplejpeg

    records = [source[i] for i in range(source.size)]
    make = streaming.TrainExamples(source, 0, source.size, SIDE)
    windows = [
        jpeg.random_window(np.random.default_rng(i), *simplejpeg.decode_jpeg_header(r.data)[:2])
        for i, r in enumerate(records)
    ]
    pixels = [np.zeros((w.height, w.width, 3), np.uint8) for w in windows]
    tasks: dict[str, Callable[[int], object]] = {
        "decode whole": lambda i: simplejpeg.decode_jpeg(records[i].data),
        "decode at 1/8: the entropy coding": lambda i: simplejpeg.decode_jpeg(
            records[i].data, min_height=1, min_width=1, min_factor=8
        ),
        "decode the window and resize": lambda i: jpeg.decode(
            records[i].data, lambda height, width: windows[i], SIDE
        ),
        "resize": lambda i: cv2.resize(pixels[i], (SIDE, SIDE)),
        "read the record": lambda i: source[i],
        "draw the window": lambda i: jpeg.random_window(
            np.random.Generator(np.random.Philox(key=0, counter=[0, 0, 0, i])), 375, 500
        ),
        "an example, all of it": lambda i: make(i, i),
        "an example of the PIL pipeline": functools.partial(pil_example, records, windows),
    }
    seconds = {name: [] for name in tasks}
    for _, (name, task) in itertools.product(range(7), tasks.items()):
        start = time.perf_counter()
        for i in range(source.size):
            task(i)
        seconds[name].append((time.perf_counter() - start) / source.size)
    print("\none image, one core, best of 7          ms   of a whole decode")
    for name, times in seconds.items():
        share = min(times) / min(seconds["decode whole"])
        print(f"{name:38s} {min(times) * 1e3:6.3f}   {share:6.2f}")


def pil_example(records: list, windows: list[jpeg.Window], i: int) -> np.ndarray:
    """The same image by PIL, as a float array of channels first."""
    image = pil_image(records[i].data, windows[i], flipped=i % 2 == 0)
    return np.asarray(image, np.uint8).transpose(2, 0, 1).astype(np.float32) / 255


def pil_image(data: bytes, window: jpeg.Window, flipped: bool):
    """The steps of torchvision's RandomResizedCrop and RandomHorizontalFlip on PIL images."""
    import io

    from PIL import Image

    image = Image.open(io.BytesIO(data)).convert("RGB")
    top, left, height, width = window
    image = image.crop((left, top, left + width, top + height))
    image = image.resize((SIDE, SIDE), Image.Resampling.BILINEAR)
    return image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if flipped else image


class Repeated:
    """The same images as often as it takes to have as many as ImageNet."""

    size = 1_281_167

    def __init__(self, source: Source):
        self._source = source

    def __getitem__(self, index: int) -> imagenet.Record:
        return self._source[index % self._source.size]

    def name(self, index: int) -> str:
        """That of the image."""
        return self._source.name(index % self._source.size)

    def place(self, index: int) -> str:
        """Where the image is."""
        return self._source.place(index % self._source.size)


class TorchImages:
    """A map-style data set as PyTorch users write it."""

    def __init__(self, source: Source):
        self.source = source

    def __len__(self) -> int:
        return self.source.size

    def __getitem__(self, index: int):
        import io

        import torch
        from PIL import Image

        rng = np.random.default_rng(index)
        record = self.source[index]
        width, height = Image.open(io.BytesIO(record.data)).size
        window = jpeg.random_window(rng, height, width)
        image = pil_image(record.data, window, flipped=rng.random() < 0.5)
        # torchvision's to_tensor.
        pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()
        return pixels.to(torch.float32).div(255), record.label


def ours(options: Options, source: Source) -> Iterator[object]:
    """Batches on the device."""
    mesh = sharding.make_mesh(TrainConfig(train_bs=options.batch_size, test_bs=jax.device_count()))
    stream = streaming.train_stream(
        SPEC,
        source,
        seed=0,
        epochs=10**6,
        batch_size=options.batch_size,
        sharding=sharding.over_batch(mesh),
        workers=options.workers,
    )
    try:
        while True:
            yield jax.block_until_ready(next(stream).batch)
    finally:
        stream.close()


def torch_batches(options: Options, source: Source) -> Iterator[object]:
    """Batches in memory."""
    import torch.utils.data

    return iter(
        torch.utils.data.DataLoader(
            TorchImages(source),
            options.batch_size,
            shuffle=True,
            num_workers=options.workers,
            multiprocessing_context="spawn",
        )
    )


def decode_alone(options: Options, source: Source) -> Iterator[object]:
    """As many images as a batch has, decoded by as many processes."""
    with multiprocessing.get_context("spawn").Pool(
        options.workers, initializer=_keep_records, initargs=(source,)
    ) as pool:
        for start in itertools.count(0, options.batch_size):
            share = range(start, start + options.batch_size)
            yield pool.map(_decode, share, chunksize=-(-len(share) // options.workers))


_records: list[bytes] = []


def _keep_records(source: Source) -> None:
    # As many as fit into memory many times over, which is no part of what is timed.
    _records.extend(source[i].data for i in range(200))


def _decode(index: int) -> None:
    import simplejpeg

    simplejpeg.decode_jpeg(_records[index % len(_records)], fastupsample=True)


def pipelines(options: Options, source: Source) -> None:
    """Images a second, each pipeline with all the machine to itself while it is timed."""
    makers = {"ours": ours, "torch": torch_batches, "decode": decode_alone}
    try:
        import torch  # noqa: F401
    except ImportError:
        print("\nno PyTorch here: `pip install -e '.[bench]'` has it")
        del makers["torch"]
    rates = {name: [] for name in makers}
    for _, (name, make) in itertools.product(range(options.turns), makers.items()):
        rates[name].append(rate(options, make(options, source)))
    cores = min(options.workers, os.cpu_count())
    print(f"\nimages/s per core, {options.workers} workers on {cores} cores, {options.turns} turns")
    for name, values in rates.items():
        ratios = [ours / value for ours, value in zip(rates["ours"], values, strict=True)]
        print(
            f"{name:8s} {statistics.median(values) / cores:7.0f}   ours is "
            f"{statistics.median(ratios):.2f} times that ({min(ratios):.2f}-{max(ratios):.2f})"
        )


def rate(options: Options, batches: Iterator[object]) -> float:
    """Images a second once the pipeline runs."""
    # What was made ahead while the workers started is taken first.
    for _ in range(4 + 2 * options.workers):
        next(batches)
    count = options.images // options.batch_size
    start = time.perf_counter()
    for _ in range(count):
        next(batches)
    seconds = time.perf_counter() - start
    if hasattr(batches, "close"):
        batches.close()
    return count * options.batch_size / seconds


def waits(options: Options, source: Source) -> None:
    """What share of the time goes by in waiting for a batch."""
    config = TrainConfig(arch="resnet50", dataset="imagenet").resolved()
    plan = make_plan(config, sharding.make_mesh(config))
    state, loss = plan.create_train_state(), LOSSES["xent"]

    def resnet50(state, batch):
        images = normalise(SPEC, batch.images, np.float32)
        return train_step(plan.graphdef, plan.tx, loss, state, batch._replace(images=images))[0]

    nothing = lambda state, batch: state
    print("\nstep        batch   s a step   waiting for data")
    for name, step, batch_size, count in (
        ("resnet50", resnet50, 32, 6),
        ("nothing", nothing, 100, 30),
    ):
        step = jax.jit(step)
        batches = ours(dataclasses.replace(options, batch_size=batch_size), source)
        for _ in range(3):
            jax.block_until_ready(step(state, next(batches)))
        waited, start = 0.0, time.perf_counter()
        for _ in range(count):
            asked = time.perf_counter()
            batch = next(batches)
            waited += time.perf_counter() - asked
            jax.block_until_ready(step(state, batch))
        seconds = time.perf_counter() - start
        batches.close()
        print(f"{name:10s} {batch_size:6d} {seconds / count:10.3f}   {waited / seconds:8.1%}")


if __name__ == "__main__":
    main(tyro.cli(Options, use_underscores=True))
