"""What `epoch.py` measures against: the same training in PyTorch, as its users write it.

The networks of `models/`, automatic gradient descent, and a DataLoader over a data set that crops,
flips and normalises each image with PIL and NumPy. On a CPU eager; on a GPU with channels last and
`torch.compile`.
"""

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterable

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812 (its usual name)
import torch.utils.data
from PIL import Image, ImageOps
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from input_pipeline.specs import DatasetSpec

PADDING = 4
VGG16 = (64, 64, "M", 128, 128, "M", 256, 256, 256, "M", 512, 512, 512, "M", 512, 512, 512, "M")


class Images(torch.utils.data.Dataset):
    """A map-style data set: padded by 4, cropped at random, flipped by turns of a coin."""

    def __init__(self, spec: DatasetSpec, images: np.ndarray, labels: np.ndarray):
        self.images, self.labels = images, labels
        self.mean = np.array(spec.mean, np.float32)[:, None, None]
        self.std = np.array(spec.std, np.float32)[:, None, None]

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        image = Image.fromarray(self.images[index])
        width, height = image.size
        image = ImageOps.expand(image, PADDING)
        left, top = torch.randint(0, 2 * PADDING + 1, (2,)).tolist()
        image = image.crop((left, top, left + width, top + height))
        if torch.rand(()) < 0.5:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        pixels = np.asarray(image, np.float32).transpose(2, 0, 1) / 255
        return torch.from_numpy((pixels - self.mean) / self.std), int(self.labels[index])


class Block(nn.Module):
    """A pre-activation residual block of two 3x3 convolutions."""

    def __init__(self, d_in: int, d_out: int, stride: int):
        super().__init__()
        self.norm1, self.conv1 = norm(d_in), conv(d_in, d_out, 3, stride)
        self.norm2, self.conv2 = norm(d_out), conv(d_out, d_out, 3)
        changes = (d_in, stride) != (d_out, 1)
        self.shortcut = conv(d_in, d_out, 1, stride) if changes else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``(batch, d_in, height, width)`` to ``(batch, d_out, height', width')``."""
        h = F.relu(self.norm1(x))
        if self.shortcut is not None:
            x = self.shortcut(h)
        return self.conv2(F.relu(self.norm2(self.conv1(h)))) + x


class MeanOfMap(nn.Module):
    """The mean over height and width."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``(batch, channels, height, width)`` to ``(batch, channels)``."""
        return x.mean((2, 3))


class ScaledReLU(nn.Module):
    """What restores the mean square that a relu halves."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Any shape."""
        return math.sqrt(2) * F.relu(x)


def conv(d_in: int, d_out: int, size: int, stride: int = 1) -> nn.Conv2d:
    """A square convolution without bias."""
    return nn.Conv2d(d_in, d_out, size, stride, size // 2, bias=False)


def norm(channels: int) -> nn.BatchNorm2d:
    """Batch normalisation without scale and offset."""
    return nn.BatchNorm2d(channels, affine=False)


def fcn(
    image_shape: tuple[int, int, int], classes: int, depth: int = 10, width: int = 256
) -> nn.Module:
    """The fully connected network."""
    widths = [math.prod(image_shape)] + [width] * (depth - 1)
    layers = [nn.Flatten()]
    for d_in, d_out in itertools.pairwise(widths):
        layers += [nn.Linear(d_in, d_out, bias=False), ScaledReLU()]
    return nn.Sequential(*layers, nn.Linear(widths[-1], classes, bias=False))


def vgg16(image_shape: tuple[int, int, int], classes: int) -> nn.Module:
    """VGG-16 with BatchNorm, for images of 32x32."""
    layers, channels = [], image_shape[2]
    for width in VGG16:
        if width == "M":
            layers.append(nn.MaxPool2d(2))
        else:
            layers += [conv(channels, width, 3), norm(width), nn.ReLU()]
            channels = width
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(channels, classes, bias=False))


def resnet18(image_shape: tuple[int, int, int], classes: int) -> nn.Module:
    """The pre-activation ResNet-18 for small images."""
    layers, channels = [conv(image_shape[2], 64, 3)], 64
    for stage in range(4):
        for i in range(2):
            layers.append(Block(channels, 64 << stage, 2 if stage > 0 and i == 0 else 1))
            channels = 64 << stage
    return nn.Sequential(*layers, MeanOfMap(), nn.Linear(channels, classes, bias=False))


class AGD(torch.optim.Optimizer):
    """Automatic gradient descent, with the parameters' axes in PyTorch's order, outputs first."""

    def __init__(self, parameters: Iterable[nn.Parameter]):
        super().__init__(parameters, {})

    @torch.no_grad()
    def step(self) -> torch.Tensor:
        """Moves every parameter by its share of eta, which it returns."""
        parameters = [p for group in self.param_groups for p in group["params"]]
        norms = [p.grad.norm(dim=(0, 1), keepdim=True) for p in parameters]
        dual = sum(scale(p) * n.sum() for p, n in zip(parameters, norms, strict=True))
        summary = dual / len(parameters)
        eta = torch.log((1 + torch.sqrt(1 + 4 * summary)) / 2)
        for p, n in zip(parameters, norms, strict=True):
            factor = eta / len(parameters) * scale(p)
            p -= torch.where(n > 0, factor / n, torch.zeros_like(n)) * p.grad
        return eta


def scale(parameter: torch.Tensor) -> float:
    """``sqrt(d_out / d_in)``, for a convolution divided by the root of the number of its taps."""
    d_out, d_in, *taps = parameter.shape
    return math.sqrt(d_out / d_in / math.prod(taps))


def orthogonal_(network: nn.Module) -> None:
    """Starting weights: every tap orthogonal, times its scale."""
    with torch.no_grad():
        for p in network.parameters():
            for tap in np.ndindex(*p.shape[2:]):
                nn.init.orthogonal_(p[(..., *tap)], gain=scale(p))


def square_loss(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """The mean over batch and classes of ``(logits - sqrt(classes) * onehot)^2``."""
    classes = logits.shape[1]
    return F.mse_loss(logits, math.sqrt(classes) * F.one_hot(labels, classes).to(logits.dtype))


@dataclasses.dataclass
class Peer:
    """A network in training, and its data.

    Attributes:
      network: maps ``(batch, channels, height, width)`` to logits.
      loader: of batches ``(images, labels)``, a new order and new crops every epoch.
      device: where it trains, ``cpu`` or ``cuda``.
      bfloat16: whether products and convolutions are in bfloat16, by autocast.
    """

    network: nn.Module
    loader: torch.utils.data.DataLoader | None
    device: str = "cpu"
    bfloat16: bool = False

    def __post_init__(self):
        on_gpu = self.device != "cpu"
        self._layout = torch.channels_last if on_gpu else torch.preserve_format
        self.network.to(self.device, memory_format=self._layout)
        self.optimizer = AGD(self.network.parameters())
        self._forward = torch.compile(self.network) if on_gpu else self.network
        self._update = torch.compile(self.optimizer.step) if on_gpu else self.optimizer.step

    def step(self, images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Takes a step on a batch; returns the loss before it."""
        images = images.to(self.device, memory_format=self._layout, non_blocking=True)
        labels = labels.to(self.device, non_blocking=True)
        self.optimizer.zero_grad()
        with torch.autocast(self.device, torch.bfloat16, enabled=self.bfloat16):
            logits = self._forward(images)
        loss = square_loss(logits.float() if self.bfloat16 else logits, labels)
        loss.backward()
        self._update()
        return loss.detach()

    def train(self, steps: int) -> None:
        """Takes steps on batches of the loader, as many as an epoch has or fewer."""
        for batch in itertools.islice(self.loader, steps):
            loss = self.step(*batch)
        loss.item()  # Waits for the device.

    def flops(self, images: torch.Tensor, labels: torch.Tensor) -> int:
        """Floating-point operations of the matrix products and convolutions of a step."""
        images, labels = images.to(self.device), labels.to(self.device)
        with FlopCounterMode(display=False) as counter:
            square_loss(self.network(images), labels).backward()
        return counter.get_total_flops()


NETWORKS: dict[str, Callable[[tuple, int], nn.Module]] = {
    "fcn": fcn,
    "vgg16": vgg16,
    "resnet18": resnet18,
}


def build(
    arch: str,
    spec: DatasetSpec,
    images: np.ndarray,
    labels: np.ndarray,
    batch_size: int,
    threads: int,
    workers: int,
    device: str = "cpu",
    bfloat16: bool = False,
) -> Peer:
    """A network with fresh weights and a loader of the data set's training split.

    Args:
      arch: a key of :data:`NETWORKS`.
      spec: of the data set.
      images: ``(n, height, width, channels)`` uint8.
      labels: ``(n,)``.
      batch_size: examples in a batch; the few that are left of an epoch are dropped.
      threads: for PyTorch's operations.
      workers: processes of the loader.
      device: where it trains, ``cpu`` or ``cuda``.
      bfloat16: whether products and convolutions are in bfloat16, by autocast.
    """
    torch.set_num_threads(threads)
    network = NETWORKS[arch](spec.image_shape, spec.num_classes)
    orthogonal_(network)
    dataset = Images(spec, images, labels)
    loader = torch.utils.data.DataLoader(
        dataset,
        batch_size,
        shuffle=True,
        drop_last=True,
        num_workers=workers,
        # JAX has threads, with which a process cannot be forked.
        multiprocessing_context="spawn" if workers else None,
        persistent_workers=workers > 0,
        pin_memory=device != "cpu",
    )
    return Peer(network, loader, device, bfloat16)
