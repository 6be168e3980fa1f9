"""Exports a trained network to one safetensors file, which any framework can read.

    ./run export runs/cifar10-resnet18 resnet18.safetensors

The tensors are the parameters, such as ``blocks.0.convs.1.kernel``, and BatchNorm's running
averages, such as ``blocks.0.norms.1.mean``, in Flax's axis order. The metadata, each value in JSON,
tell how to use them: see :func:`metadata`.
"""

import json
import logging
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro
from etils import epath

from input_pipeline.command_line import FOLDER, complain, parse, say
from training.errors import ConfigError

if TYPE_CHECKING:
    from training.checkpoints.reading import Trained, Which

SUFFIX = ".safetensors"


@dataclass(frozen=True)
class Options:
    """Exports the parameters of a trained network as safetensors."""

    workdir: Annotated[tyro.conf.Positional[epath.Path], FOLDER, tyro.conf.arg(metavar="WORKDIR")]
    """The folder of the run."""
    file: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="FILE")]
    """The file to write."""
    which: Annotated[Literal["best", "last"], tyro.conf.arg(metavar="best|last")] = "best"
    """The checkpoint of the best epoch, or the last one."""
    plain: bool = False
    """Of a run with --average, the last weights and not their average."""


def metadata(trained: "Trained") -> dict[str, str]:
    """Returns the metadata of a file, in JSON, on the network and the images it takes.

    These are ``config``: all flags; ``step``: the step after which the network was saved;
    ``image_shape``: ``(height, width, channels)``, without the batch; ``mean`` and ``std``: those
    of each channel, where the network's input is ``(pixel / 255 - mean) / std``; ``dtype``: the
    dtype in which the network computes; ``classes``: the class names, in the order of the logits.
    """
    import numpy as np

    from training.state import DTYPES

    config, spec = trained.config, trained.config.spec
    facts = {
        "config": config.to_json(),
        "step": trained.step,
        "image_shape": spec.image_shape,
        "mean": spec.mean,
        "std": spec.std,
        "dtype": np.dtype(DTYPES[config.precision][0]).name,
        "classes": trained.classes,
    }
    return {name: json.dumps(fact) for name, fact in facts.items()}


def export(
    workdir: epath.PathLike, file: Path, which: "Which" = "best", plain: bool = False
) -> int:
    """Writes the file, whole or not at all.

    Args:
      workdir: the folder of the run.
      file: the file to write; an existing file is replaced.
      which: "best" or "last", as in :func:`training.checkpoints.load`.
      plain: whether the last weights of a run with ``--average`` are meant, likewise.

    Returns:
      The number of tensors.

    Raises:
      ConfigError: if there is no such checkpoint, or the file cannot be written, or its name does
        not end in :data:`SUFFIX`.
    """
    if not file.name.endswith(SUFFIX):
        raise ConfigError(f"{file}: is written as safetensors; give a name that ends in {SUFFIX}")
    import numpy as np
    import safetensors.numpy
    from flax import nnx

    from training.checkpoints.reading import load_all

    trained = load_all(workdir, which, plain)
    state = nnx.to_flat_state(nnx.state(trained.model, (nnx.Param, nnx.BatchStat)))
    tensors = {".".join(map(str, path)): np.asarray(leaf[...]) for path, leaf in state}
    partial = file.with_name(file.name + ".partial")
    try:
        safetensors.numpy.save_file(tensors, partial, metadata(trained))
        partial.replace(file)
    except (OSError, safetensors.SafetensorError) as error:
        raise ConfigError(f"{file}: cannot be written ({error})") from error
    return len(tensors)


def main() -> int:
    """Exports a network as the flags say. Returns the exit code: 0, or 2 on a ConfigError."""
    options = parse(Options, "./run export")
    logging.basicConfig(format="%(message)s")
    import jax

    # Writing arrays to a file needs no accelerator, which may be busy.
    jax.config.update("jax_platforms", "cpu")
    try:
        count = export(options.workdir, options.file, options.which, options.plain)
    except ConfigError as error:
        complain(f"error: {error}")
        return 2
    say(f"{options.file}: {count} tensors of the {options.which} checkpoint")
    return 0


if __name__ == "__main__":
    sys.exit(main())
