"""What names and shapes give away where there is no geometry: biases, and what is ambiguous."""

import warnings
from typing import Any

import jax

from agd_jax.geometry import path_of


def is_bias(path: tuple[Any, ...]) -> bool:
    """Whether a parameter is named ``bias``, given its path in its tree.

    >>> [(path, _)] = jax.tree.leaves_with_path({'query': {'bias': 1.0}})
    >>> is_bias(path)
    True
    """
    return path_of(path).split(".")[-1] == "bias"


def warn_of_ambiguous_shapes(params: Any) -> None:
    """Warns of parameters whose shapes do not say which axes are inputs and which are outputs.

    Those are all with three axes, which may be a convolution in one dimension, a projection in
    attention or a stack of layers; biases with several axes; and Equinox's layers, which have
    their outputs before their inputs.

    Args:
      params: a tree of parameters, or of their shapes.
    """

    def in_equinox(node: object) -> bool:
        # An embedding has its inputs first, as here.
        kind = type(node)
        return kind.__module__.startswith("equinox.nn") and kind.__name__ != "Embedding"

    ambiguous = []
    for start, node in jax.tree.leaves_with_path(params, is_leaf=in_equinox):
        for end, leaf in jax.tree.leaves_with_path(node):
            path, shape = (*start, *end), getattr(leaf, "shape", ())
            if len(shape) == 3 or (len(shape) > 1 and (in_equinox(node) or is_bias(path))):
                ambiguous.append(f"{path_of(path)} {tuple(shape)}")
    if ambiguous:
        more = f" and {len(ambiguous) - 3} more" if len(ambiguous) > 3 else ""
        warnings.warn(
            "from shapes alone, agd_jax takes the last two axes of a parameter for its inputs and "
            "outputs, in this order, and those before for taps, as in Flax's dense and convolution "
            f"kernels. Of {', '.join(ambiguous[:3])}{more} that may be wrong, and with it the size "
            "of steps and starting weights. Let the program say it: "
            "geometry = agd_jax.geometry_of(apply, params, *example_inputs), then "
            "agd_jax.agd(geometry=geometry) and agd_jax.orthogonal_init(key, params, geometry)",
            stacklevel=3,
        )
