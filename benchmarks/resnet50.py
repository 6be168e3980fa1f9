"""Images a second of ResNet-50 at 224 pixels in bfloat16, against timm's in PyTorch, on a GPU.

    XLA_PYTHON_CLIENT_MEM_FRACTION=.45 python benchmarks/resnet50.py --data_dir DIR

- `ours, noise`: training with `--dataset synthetic_imagenet`: no disk and no decoder;
- `ours, JPEGs`: training with `--dataset imagenet`, on the images in `DIR`, repeated;
- `timm, noise`: timm's `resnet50` with `torch.compile`, channels last and autocast, trained by SGD
  with momentum on a batch that stays on the device;
- `timm, JPEGs`: the same, behind a DataLoader that decodes those images with PIL.

All take turns, and the ratios are medians of those within a turn.
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

import jax
import tyro

sys.path.insert(0, os.fspath(Path(__file__).parent.parent))
from benchmarks import input_pipeline
from benchmarks.ours import Started
from input_pipeline import imagenet
from input_pipeline.streaming import Sources
from training.config import TrainConfig


@dataclasses.dataclass(frozen=True)
class Options:
    """Times training of ResNet-50 side by side with timm's."""

    data_dir: str
    """ImageNet, or part of it: a folder with train and val, or a TFDS folder."""
    batch_size: int = 256
    """Images in a batch."""
    image_size: int = 224
    """Side of the images."""
    steps: int = 300
    """Steps timed in each turn: many more than workers make ahead while others take theirs."""
    turns: int = 3
    """How often each is timed."""
    workers: int | None = None
    """Processes that decode, on both sides; by default as many as there are cores."""
    peer: bool = True
    """Whether to time timm's too."""


def main(options: Options) -> None:
    """Prints the table of ``benchmarks/RESULTS.md``."""
    trainers = {
        "ours, noise": Ours(options, "synthetic_imagenet"),
        "ours, JPEGs": Ours(options, "imagenet"),
    }
    if options.peer:
        timm = Timm(options)
        trainers["timm, noise"] = timm
        trainers["timm, JPEGs"] = functools.partial(timm, from_loader=True)
    rates = {name: [] for name in trainers}
    for turn in range(options.turns + 1):
        for name, train in trainers.items():
            rate = timed(train, options)
            if turn:  # The first warms up.
                rates[name].append(rate)
    print(f"\n{jax.devices()[0].device_kind}, batches of {options.batch_size}, bfloat16")
    print("               images/s   of ours, noise")
    for name, found in rates.items():
        ratios = [a / b for a, b in zip(found, rates["ours, noise"], strict=True)]
        print(
            f"{name:12s}  {statistics.median(found):9.0f}   "
            f"{statistics.median(ratios):.2f} ({min(ratios):.2f}-{max(ratios):.2f})"
        )


def timed(train: Callable[[int], None], options: Options) -> float:
    """Images a second, once a few steps have been taken."""
    train(10)
    start = time.perf_counter()
    train(options.steps)
    return options.steps * options.batch_size / (time.perf_counter() - start)


class Ours(Started):
    """Training as `train.py` does it, on data that never end."""

    def __init__(self, options: Options, dataset: str):
        super().__init__(
            TrainConfig(
                arch="resnet50",
                dataset=dataset,
                data_dir=options.data_dir if dataset == "imagenet" else None,
                image_size=options.image_size,
                train_bs=options.batch_size,
                test_bs=options.batch_size,
                precision="bf16",
                workers=options.workers if dataset == "imagenet" else None,
            )
        )
        self._taken = 0

    def load(self, config: TrainConfig) -> Sources:
        """The data of the config, JPEGs as often as it takes to have as many as ImageNet."""
        data = super().load(config)
        if config.dataset == "imagenet":
            data = data._replace(train=input_pipeline.Repeated(data.train))
        return data

    def __call__(self, steps: int) -> None:
        """Takes steps, and waits for them."""
        self._taken += steps
        self.state, _ = self.feed.train(self.state, self.feed.zero_metrics(), self._taken)
        jax.block_until_ready(self.state)


class Timm:
    """The same network in PyTorch, as its users train it."""

    def __init__(self, options: Options):
        import timm
        import torch
        import torch.utils.data

        network = timm.create_model("resnet50").cuda().to(memory_format=torch.channels_last)
        self._network = torch.compile(network)
        self._optimizer = torch.optim.SGD(network.parameters(), 0.1, momentum=0.9, fused=True)
        shape = options.batch_size, 3, options.image_size, options.image_size
        images = torch.randn(shape).to(memory_format=torch.channels_last)
        labels = torch.randint(1000, shape[:1])
        self._resident = images.cuda(memory_format=torch.channels_last), labels.cuda()
        source = imagenet.find(input_pipeline.SPEC, options.data_dir).train
        loader = torch.utils.data.DataLoader(
            input_pipeline.TorchImages(input_pipeline.Repeated(source)),
            options.batch_size,
            shuffle=True,
            num_workers=options.workers or os.cpu_count(),
            multiprocessing_context="spawn",
            pin_memory=True,
        )
        self._loaded = itertools.chain.from_iterable(iter(loader) for _ in itertools.count())

    def __call__(self, steps: int, from_loader: bool = False) -> None:
        """Takes steps, and waits for them."""
        import torch

        batches = self._loaded if from_loader else itertools.repeat(self._resident)
        for images, labels in itertools.islice(batches, steps):
            images = images.cuda(non_blocking=True).to(memory_format=torch.channels_last)
            with torch.autocast("cuda", torch.bfloat16):
                logits = self._network(images)
                loss = torch.nn.functional.cross_entropy(logits, labels.cuda(non_blocking=True))
            self._optimizer.zero_grad()
            loss.backward()
            self._optimizer.step()
        torch.cuda.synchronize()


if __name__ == "__main__":
    main(tyro.cli(Options, use_underscores=True))
