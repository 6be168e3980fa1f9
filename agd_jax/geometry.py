r"""How AGD sees a parameter: which axes are inputs and outputs, its scale, its norm, its direction.

A parameter is seen as blocks, each a matrix of ``d_in`` inputs and ``d_out`` outputs, measured by
its Frobenius norm :math:`\|\cdot\|_F`. That bounds the operator norm from the RMS norm of its
inputs to the RMS norm of its outputs times :math:`\sqrt{d_{out} / d_{in}}`, and so does the scale
:math:`s` which a step of unit size has. With :math:`t` counting blocks, the norm in which the step
is measured is :math:`\max_t \|W_t\|_F / s`, its dual :math:`s \sum_t \|g_t\|_F`, and the
direction of steepest ascent of unit size :math:`s\, g_t / \|g_t\|_F`. The kinds differ by what a
block is:

- ``matrix``: the whole of it, however many axes are contracted with data (``d_in``) and left
  (``d_out``); :math:`s = \sqrt{d_{out} / d_{in}}`.
- ``convolution``: a tap of the kernel, of each group; the paper shares :math:`s` among the
  :math:`n` taps whose results are added: :math:`s = \sqrt{d_{out} / d_{in}} / \sqrt n`.
- ``lookup``, as an embedding: a row, which is the output for one of the inputs alone;
  :math:`s = \sqrt{d_{out}}`. A row that is not looked up does not move.
- ``offset``, as a bias or a class token: the whole of it, a map from the constant 1;
  :math:`s = \sqrt{d_{out}}`.
- ``scale``, as that of a normalisation: a diagonal matrix, whose operator norm is its largest
  entry. It is measured by the root mean square of its entries, which is of that size where entries
  are alike, and not by the Frobenius norm, which is larger by the root of their number:
  :math:`s = \sqrt{d_{out}}`. It starts at one, and an offset at zero.

What a program goes over one by one, as the layers of a scan or experts, are as many tensors as
there are layers, not one. Compare *Old Optimizer, New Norm*, https://arxiv.org/abs/2409.20325, and
*Scalable Optimization in the Modular Norm*, https://arxiv.org/abs/2405.14813.

**Effective depth.** A relative change :math:`\delta_k` of each parameter changes the results of the
network, to first order, by about :math:`\sum_k a_k \delta_k` of their size. The influence
:math:`a_k` is one for parameters in series. Of a sum of :math:`n` terms, which are taken to be of
one size, each passes on its :math:`n`-th part, so that the layers beside a long residual stream
have little influence each. The effective depth is :math:`D = \sum_k a_k`, and equals the number
:math:`L` of tensors where nothing is summed. Steps of :math:`\delta_k = \eta / D` change the
results by :math:`\eta`, as the paper's :math:`\eta / L` do in a chain, and the bound that chooses
:math:`\eta` holds with :math:`D` in place of :math:`L`.

**Mass.** How the change of the results is shared out among parameters is free: as in the modular
norm, parameter :math:`k` may have a mass :math:`m_k` and steps of :math:`\delta_k = m_k \eta / D`
with :math:`D = \sum_k m_k a_k`, which change the results by :math:`\eta` too. That
multiplies :math:`s_k` by :math:`m_k`, in the step and in the dual norm. Matrices, kernels and
lookups have mass 1, offsets and scales :data:`VECTOR_MASS`: they are more than half of the tensors
of many networks, and little of what these learn. The number is measured, not derived
(``docs/results.md``).
"""

from __future__ import annotations

import itertools
import math
import warnings
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from optax.contrib import MuonDimensionNumbers

from agd_jax import reading
from agd_jax.reading import Factor, Use

# The kinds of parameters whose blocks are matrices with inputs, and of those that are vectors.
MATRICES = ("matrix", "convolution")
VECTORS = ("offset", "scale")
# The mass of vectors.
VECTOR_MASS = 0.1


def norm_dtype(dtype: jax.typing.DTypeLike) -> jnp.dtype:
    """The dtype in which norms of such an array are taken: float32, or float64 for float64."""
    return jnp.promote_types(dtype, jnp.float32)


@dataclass(frozen=True)
class Layout:
    """Which axes of a parameter are what.

    Attributes:
      kind: ``matrix``, ``convolution``, ``lookup``, ``offset`` or ``scale``.
      shape: the shape of the parameter.
      view: a shape of as many entries, in which each axis has one role.
      inputs: axes of the view, as are the next.
      outputs: likewise.
      taps: those of a convolution's kernel.
      blocks: rows of a lookup, groups of a convolution: each is normalised by itself.
      layers: each is a tensor of its own.
      mass: what its scale is multiplied by, as its part of a step.
    """

    kind: str
    shape: tuple[int, ...]
    view: tuple[int, ...]
    inputs: tuple[int, ...] = ()
    outputs: tuple[int, ...] = ()
    taps: tuple[int, ...] = ()
    blocks: tuple[int, ...] = ()
    layers: tuple[int, ...] = ()
    mass: float = 1.0

    def count(self, *roles: str) -> int:
        """Returns how many there are of some role: the product of its axes."""
        return math.prod(self.view[axis] for role in roles for axis in getattr(self, role))

    @property
    def scale(self) -> float:
        """The scale ``s``, the size of a step of unit length.

        >>> Layout.of_shape((4, 16)).scale
        2.0
        >>> Layout.of_shape((3, 3, 8, 8)).scale == 1 / 3
        True
        """
        # Only an empty parameter has a zero here; it has no entries for its scale to matter to.
        ratio = self.count("outputs") / max(self.count("inputs", "taps"), 1)
        return self.mass * math.sqrt(ratio)

    @classmethod
    def of_shape(cls, shape: Sequence[int]) -> Layout:
        """Returns the layout of a parameter of which nothing but its shape is known.

        Its last two axes are the inputs and the outputs of a matrix, and those before count taps,
        as in Flax's dense and convolution kernels. A vector of ``d_out`` entries maps the constant
        1 to these; a scalar is ``(1, 1)``.

        >>> Layout.of_shape((3, 3, 64, 128)).taps
        (0, 1)
        >>> Layout.of_shape((10,)).scale == 10**0.5
        True
        """
        shape, axes = tuple(shape), tuple(range(len(shape)))
        kind = (
            ("offset", "offset", "matrix")[min(len(shape), 2)] if len(shape) < 3 else "convolution"
        )
        return cls(kind, shape, shape, axes[-2:-1], axes[-1:], axes[:-2])

    @classmethod
    def of_uses(cls, shape: Sequence[int], uses: Counter[Use]) -> Layout:
        """Returns the layout of a parameter that is used in some ways.

        Of several ways, as of an embedding that is also the last layer, it is the one whose steps
        are the smallest, so that they are small enough for the others too.
        """
        layouts = [_layout(tuple(shape), use, count) for use, count in uses.items()]
        return min(layouts, key=lambda one: one.scale * math.sqrt(one.count("taps", "blocks")))

    def norms(self, grad: jax.Array) -> jax.Array:
        """Frobenius norm of every block.

        Args:
          grad: floating array of the parameter's shape.

        Returns:
          Norms in :func:`norm_dtype`, of the view's rank: the axes of inputs and outputs have
          length 1. In float32, squares of entries above 1e19 overflow, and below 1e-19 vanish.
        """
        squares = jnp.square(self._seen(grad))
        return jnp.sqrt(jnp.sum(squares, axis=self.inputs + self.outputs, keepdims=True))

    def dual_norm(self, norms: jax.Array) -> jax.Array:
        """What the parameter adds to the gradient summary, ``s * sum_blocks ||g||_F``.

        Args:
          norms: those of its gradient, from :meth:`norms`.

        Returns:
          A scalar; of a parameter with layers, an array of the view's rank, with one for each.
        """
        if not self.layers:
            return self.scale * jnp.sum(norms)
        others = tuple(axis for axis in range(len(self.view)) if axis not in self.layers)
        return self.scale * jnp.sum(norms, axis=others, keepdims=True)

    def direction(
        self, grad: jax.Array, norms: jax.Array, size: jax.typing.ArrayLike = 1
    ) -> jax.Array:
        """Steepest-ascent direction of unit size: ``s * g / ||g||_F`` for each block.

        Args:
          grad: floating array of the parameter's shape.
          norms: its norms, from :meth:`norms`.
          size: multiplies it; a scalar, or one for each layer, as :meth:`dual_norm` returns.

        Returns:
          An array of ``grad``'s shape, in :func:`norm_dtype`; zero in a block whose gradient is
          zero.
        """
        # Compared with zero, and not `norms > 0`, so that a NaN stays visible.
        factors = jnp.where(norms == 0, 0, self.scale / norms)
        return jnp.multiply(size, factors * self._seen(grad)).reshape(grad.shape)

    def to_rows(self, array: jax.Array) -> jax.Array:
        """Returns an array as ``(-1, d_out)``: layers, blocks, taps and inputs count its rows."""
        ordered = jnp.transpose(array.reshape(self.view), self._order)
        return ordered.reshape(-1, self.count("outputs"))

    def from_rows(self, rows: jax.Array) -> jax.Array:
        """Returns the array of such rows, the inverse of :meth:`to_rows`."""
        ordered = rows.reshape([self.view[axis] for axis in self._order])
        return jnp.transpose(ordered, tuple(np.argsort(self._order))).reshape(self.shape)

    @property
    def _order(self) -> tuple[int, ...]:
        return (*self.layers, *self.blocks, *self.taps, *self.inputs, *self.outputs)

    def where_present(self, grad: jax.Array, array: jax.Array) -> jax.Array:
        """Returns an array with zeros in those blocks in which a gradient is zero."""
        axes = self.inputs + self.outputs
        present = jnp.any(grad.reshape(self.view) != 0, axis=axes, keepdims=True)
        return jnp.where(present, array.reshape(self.view), 0).reshape(self.shape)

    def _seen(self, grad: jax.Array) -> jax.Array:
        if grad.shape != self.shape:
            raise ValueError(f"a gradient of shape {grad.shape}, of a parameter of {self.shape}")
        wide = grad.astype(norm_dtype(grad.dtype))
        return wide if self.view == self.shape else wide.reshape(self.view)


def _layout(shape: tuple[int, ...], use: Use, count: int) -> Layout:
    """Returns the layout that belongs to one use, which the program has so many times."""
    outputs, blocks = list(use.outputs), []
    if use.groups > 1:
        # The outputs of the first group come first.
        first = outputs.pop(0)
        blocks = [first._replace(size=use.groups)]
        rest = first.size // use.groups
        outputs[:0] = [first._replace(outer=first.outer * use.groups, size=rest)]
    inputs = list(use.inputs)
    if use.kind == "lookup":
        inputs, blocks = [], inputs
    roles = {"inputs": inputs, "outputs": outputs, "taps": list(use.taps), "blocks": blocks}
    roles["layers"] = list(use.layers)
    # Slices that are all used are layers. One slice, as of the first rows of a table, is all there
    # is of its axis.
    if count >= math.prod(factor.size for factor in use.sliced):
        roles["layers"] += use.sliced
    else:
        for factor in use.sliced:
            same = (role for role, those in roles.items() if factor.axis in {f.axis for f in those})
            roles[next(same, "layers")].append(factor)
    return _with_roles(use.kind, shape, roles)


def _with_roles(kind: str, shape: tuple[int, ...], roles: dict[str, list[Factor]]) -> Layout:
    """Returns a layout in whose view each factor is an axis."""
    view: list[int] = []
    found: dict[str, list[int]] = {role: [] for role in roles}
    for axis, size in enumerate(shape):
        here = [(f, role) for role, those in roles.items() for f in those if f.axis == axis]
        cuts = {1, size} | {cut for f, _ in here for cut in (f.outer, f.outer * f.size)}
        for low, high in itertools.pairwise(sorted(cuts)):
            covers = (role for f, role in here if f.outer <= low and f.outer * f.size >= high)
            found[next(covers, "outputs")].append(len(view))
            view.append(high // low)
    axes: Any = {role: tuple(axes) for role, axes in found.items()}
    return Layout(kind, shape, tuple(view), **axes)


class Geometry:
    """How each parameter of a network is used, and how deep it is. ``print`` shows it as a table.

    Attributes:
      layouts: how each parameter is seen, by its path, in the order of the tree.
      structure: the structure of the tree of parameters.
      influence: the influence of each parameter on the results, by its path, as above. If it is
        None, each tensor counts as one, as in the paper.
    """

    def __init__(
        self,
        layouts: Mapping[str, Layout],
        structure: Any,
        influence: Mapping[str, float] | None = None,
    ):
        """Keeps them."""
        self.layouts = dict(layouts)
        self.structure = structure
        self.influence = influence

    @property
    def depth(self) -> float | None:
        """The effective depth; None if each tensor counts as one.

        It is at least the largest mass, so that no tensor moves by more than eta.
        """
        if self.influence is None:
            return None
        masses = {path: self.layouts[path].mass for path in self.influence}
        depth = sum(masses[path] * influence for path, influence in self.influence.items())
        return max([depth, *masses.values()])

    def with_mass(self, mass: float) -> Geometry:
        """Returns the geometry with another mass of offsets and scales."""
        layouts = {
            path: replace(layout, mass=mass) if layout.kind in VECTORS else layout
            for path, layout in self.layouts.items()
        }
        return Geometry(layouts, self.structure, self.influence)

    def by_tensors(self) -> Geometry:
        """Returns the geometry in which each tensor counts as one, as in the paper."""
        return Geometry(self.with_mass(1.0).layouts, self.structure)

    def layout(self, path: str, leaf: Any) -> Layout:
        """Returns the layout of a parameter.

        Raises:
          ValueError: if the geometry has no such parameter, or one of another shape.
        """
        found = self.layouts.get(path)
        if found is None or found.shape != _shape(leaf):
            has = "none" if found is None else f"one of shape {found.shape}"
            raise ValueError(
                f"the geometry is of other parameters: of {path} {_shape(leaf)} it has {has}"
            )
        return found

    def muon_dimension_numbers(self, params: Any = None) -> Any:
        """Returns what ``optax.contrib.muon`` takes as ``muon_weight_dimension_numbers``.

        Args:
          params: the tree of parameters, or a part of it; by default all of them. So Muon may be
            given this method itself, which it has to be for Equinox, whose trees it would call.

        Returns:
          A tree of the same structure: for matrices and convolutions, with their taps among the
          inputs, a ``MuonDimensionNumbers``; for all else, and for what cannot be said by whole
          axes, as grouped convolutions, None, which Muon leaves to Adam. Muon's users leave the
          last layer to Adam too: that is for you to say.
        """
        if params is None:
            return jax.tree.unflatten(self.structure, map(_muon, self.layouts.values()))
        return jax.tree.map(_muon, layouts_of(params, self))

    def __str__(self) -> str:
        """The table: path, shape, kind, how many inputs, outputs, taps and layers, and scale."""
        heading = ("path", "shape", "kind", "inputs", "outputs", "taps", "layers", "scale")
        rows = [
            (
                path,
                str(one.shape),
                one.kind,
                *(str(one.count(role)) for role in heading[3:7]),
                f"{one.scale:.4g}",
            )
            for path, one in self.layouts.items()
        ]
        widths = [max(map(len, column)) for column in zip(heading, *rows, strict=True)]
        aligned = (
            "  ".join(
                cell.ljust(width) if number < 3 else cell.rjust(width)
                for number, (cell, width) in enumerate(zip(row, widths, strict=True))
            )
            for row in (heading, *rows)
        )
        last = [] if self.depth is None else [f"effective depth {self.depth:.4g}"]
        return "\n".join([*(line.rstrip() for line in aligned), *last])


def layouts_of(tree: Any, geometry: Geometry | None) -> Any:
    """Returns a tree with the layout of each leaf: by a geometry, or by shapes alone."""
    paths, structure = jax.tree.flatten_with_path(tree)
    if geometry is None:
        layouts = [Layout.of_shape(_shape(leaf)) for _, leaf in paths]
    else:
        layouts = [geometry.layout(path_of(path), leaf) for path, leaf in paths]
    return jax.tree.unflatten(structure, layouts)


def _shape(leaf: Any) -> tuple[int, ...]:
    return tuple(getattr(leaf, "shape", ()))  # Python's floats are parameters too.


def _muon(layout: Layout) -> MuonDimensionNumbers | None:
    if layout.kind not in MATRICES or layout.blocks:
        return None
    # Axes of length one may be missing from the view.
    whole = [axis for axis, size in enumerate(layout.shape) if size != 1]
    if layout.view != tuple(layout.shape[axis] for axis in whole):
        whole = list(range(len(layout.shape)))
        if layout.view != layout.shape:
            return None

    def axes(*roles: str) -> tuple[int, ...]:
        return tuple(sorted(whole[axis] for role in roles for axis in getattr(layout, role)))

    return MuonDimensionNumbers(axes("inputs", "taps"), axes("outputs"))


def geometry_of(
    apply: Callable[..., Any],
    params: Any,
    *example_inputs: Any,
    by_hand: Mapping[str, MuonDimensionNumbers] | None = None,
) -> Geometry:
    """Reads from a program how it uses each of its parameters, whatever they are called.

    >>> import jax, jax.numpy as jnp
    >>> def apply(params, x):
    ...   return jax.nn.relu(x @ params['hidden'] + params['bias']) @ params['out'].T
    >>> params = {'hidden': jnp.zeros((784, 64)), 'bias': jnp.zeros(64), 'out': jnp.zeros((10, 64))}
    >>> geometry = geometry_of(apply, params, jnp.zeros((2, 784)))
    >>> print(geometry)
    path    shape      kind    inputs  outputs  taps  layers   scale
    bias    (64,)      offset       1       64     1       1     0.8
    hidden  (784, 64)  matrix     784       64     1       1  0.2857
    out     (10, 64)   matrix      64       10     1       1  0.3953
    effective depth 2.1

    Args:
      apply: the network, as ``apply(params, *example_inputs)``. It is traced, and nothing is
        computed.
      params: its trainable parameters, a tree of arrays or of their shapes.
      example_inputs: its other arguments, or their shapes.
      by_hand: what is said of parameters that cannot be followed, by their paths as the table has
        them: which axes are contracted, and which are outputs. All others are batches.

    Returns:
      A :class:`Geometry`, for ``agd_jax.agd(geometry=geometry)``.

    Raises:
      ValueError: if ``by_hand`` names a parameter that there is not.

    Warns:
      UserWarning: of parameters whose use cannot be followed, with the operation that is in the
        way. They are taken as if only their shapes were known.
    """
    leaves = [(path_of(path), leaf) for path, leaf in jax.tree.leaves_with_path(params)]
    by_hand = by_hand or {}
    if unknown := by_hand.keys() - dict(leaves):
        raise ValueError(f"by_hand: there is no parameter {', '.join(sorted(unknown))}")
    found = reading.read(apply, params, *example_inputs)
    layouts, lost = {}, []
    for (path, leaf), uses, stopped in zip(leaves, found.uses, found.stopped, strict=True):
        if path in by_hand:
            layouts[path] = _given(leaf.shape, by_hand[path])
        elif uses:
            layouts[path] = Layout.of_uses(leaf.shape, uses)
        else:
            layouts[path] = Layout.of_shape(leaf.shape)
            lost.append(f"{path} {leaf.shape}: {', '.join(stopped) or 'not used'}")
    if lost:
        warnings.warn(
            "how these parameters are used cannot be read from the program, for what is named; "
            f"say it with by_hand={{path: optax.contrib.MuonDimensionNumbers(...)}}: "
            f"{'; '.join(lost)}",
            stacklevel=2,
        )
    influence = dict(zip(dict(leaves), found.influence, strict=True))
    return Geometry(layouts, jax.tree.structure(params), influence).with_mass(VECTOR_MASS)


def _given(shape: tuple[int, ...], numbers: MuonDimensionNumbers) -> Layout:
    """Returns the layout that is said by hand."""

    def axes(given: int | Sequence[int]) -> tuple[int, ...]:
        return tuple(axis % len(shape) for axis in ((given,) if isinstance(given, int) else given))

    inputs, outputs = axes(numbers.reduction_axis), axes(numbers.output_axis)
    layers = tuple(axis for axis in range(len(shape)) if axis not in (*inputs, *outputs))
    return Layout("matrix", shape, shape, inputs, outputs, layers=layers)


def path_of(path: tuple[Any, ...]) -> str:
    """Returns the path of a leaf as text.

    >>> [(path, _)] = jax.tree.leaves_with_path({'query': {'bias': 1.0}})
    >>> path_of(path)
    'query.bias'
    """
    text = jax.tree_util.keystr(path, simple=True, separator=".")
    # Flax NNX has one more name at the end.
    return text.removesuffix(".value")
