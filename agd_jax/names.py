"""What the names of parameters give away: which are biases, and whose axes AGD misreads.

:mod:`agd_jax.geometry` goes by shapes alone, and takes the axes of every parameter for those of
Flax's dense and convolution kernels.
"""

import warnings
from typing import Any

import jax


def is_bias(path: tuple[Any, ...]) -> bool:
    """Whether a parameter is named ``bias``, given its path in its tree.

    >>> [(path, _)] = jax.tree.leaves_with_path({'query': {'bias': 1.0}})
    >>> is_bias(path)
    True
    """
    return _names(path)[-1] == "bias"


def warn_of_misread_axes(params: Any) -> None:
    """Warns of parameters whose axes are not those that AGD takes them for.

    They are known by names: Equinox's layers have their outputs before their inputs, attention in
    Flax has kernels ``(d_in, heads, head_dim)``, and some biases have several axes.

    Args:
      params: a tree of parameters, or of their shapes.
    """

    def in_equinox(node: object) -> bool:
        # An embedding has its inputs first, as here.
        kind = type(node)
        return kind.__module__.startswith("equinox.nn") and kind.__name__ != "Embedding"

    found = [
        (_names((*start, *end)), leaf, in_equinox(node))
        for start, node in jax.tree.leaves_with_path(params, is_leaf=in_equinox)
        for end, leaf in jax.tree.leaves_with_path(node)
    ]
    everything = {tuple(names) for names, _, _ in found}

    def in_attention(names: list[str]) -> bool:
        siblings = {(*names[:-2], layer, names[-1]) for layer in ("query", "key", "value")}
        return tuple(names) in siblings and siblings <= everything

    misread = []
    for names, leaf, equinox in found:
        rank = getattr(leaf, "ndim", 0)
        if rank >= 2 and (equinox or names[-1] == "bias" or (rank == 3 and in_attention(names))):
            misread.append(f"{'.'.join(names)} {tuple(leaf.shape)}")
    if misread:
        more = f" and {len(misread) - 3} more" if len(misread) > 3 else ""
        warnings.warn(
            "agd_jax takes the last two axes of a parameter for its inputs and outputs, in this "
            "order, and those before for taps, as in Flax's dense and convolution kernels; so its "
            f"starting weights and steps have the wrong size for {', '.join(misread[:3])}{more}. "
            "optax.partition gives such parameters to another optimiser",
            stacklevel=1,
        )


def _names(path: tuple[Any, ...]) -> list[str]:
    names = jax.tree_util.keystr(path, simple=True, separator="/").split("/")
    # Flax NNX has one more name at the end.
    return names[:-1] if len(names) > 1 and names[-1] == "value" else names
