"""Writes what a run has learnt into one file of safetensors, which any framework reads.

    python -m training.export runs/cifar10-resnet18 resnet18.safetensors

Its tensors are the parameters, ``blocks.0.convs.1.kernel``, and BatchNorm's running averages,
``blocks.0.norms.1.mean``, in Flax's axis order; its metadata has the config, as JSON.
"""

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from training.config import ConfigError


@dataclass(frozen=True)
class Options:
    """Exports the parameters of a trained network as safetensors."""

    workdir: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="WORKDIR")]
    """The folder of the run."""
    file: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="FILE")]
    """The file to write."""
    which: Annotated[Literal["best", "last"], tyro.conf.arg(metavar="best|last")] = "best"
    """The checkpoint of the best epoch, or the last one."""


def export(workdir: Path, file: Path, which: str = "best") -> int:
    """Writes the file, whole or not at all.

    Args:
      workdir: of a run.
      file: to write; one that is there is replaced.
      which: "best" or "last", as in :func:`training.checkpoints.load`.

    Returns:
      The number of tensors.

    Raises:
      ConfigError: if there is no such checkpoint, or the file cannot be written.
    """
    import numpy as np
    import safetensors.numpy
    from flax import nnx

    from training.checkpoints import load

    model, config = load(workdir, which)
    state = nnx.to_flat_state(nnx.state(model, (nnx.Param, nnx.BatchStat)))
    tensors = {".".join(map(str, path)): np.asarray(leaf[...]) for path, leaf in state}
    partial = file.with_name(file.name + ".partial")
    try:
        safetensors.numpy.save_file(tensors, partial, {"config": json.dumps(config.to_json())})
        partial.replace(file)
    except (OSError, safetensors.SafetensorError) as error:
        raise ConfigError(f"{file}: cannot be written ({error})") from error
    return len(tensors)


def main() -> int:
    """Returns the exit code: 0, or 2 if it was asked for in a wrong way."""
    options = tyro.cli(Options, use_underscores=True)
    try:
        count = export(options.workdir, options.file, options.which)
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{options.file}: {count} tensors of the {options.which} checkpoint")
    return 0


if __name__ == "__main__":
    sys.exit(main())
