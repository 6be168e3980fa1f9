"""A convolution: XLA's own on an accelerator, and the quickest of three forms on a CPU.

On a CPU, XLA's convolutions use one thread where a map is narrow. They take a hundred times too
long on maps of 2x2, and the gradient of a kernel takes twice as long as a matrix product. XLA's
matrix products, though, run at the machine's peak. So on a CPU the output, the gradient of the
input and the gradient of the kernel are each computed in one of three forms:

- ``native``: :func:`jax.lax.conv_general_dilated` and its gradients;
- ``taps``: one matrix product for each of the kernel's taps, over the pixels that meet it;
- ``winograd``: F(2x2, 3x3) of Lavin and Gray, arXiv:1509.09308. It forms 16 linear combinations
  of each 4x4 tile of the input and 16 of the 3x3 kernel, multiplies them in 16 matrix products,
  and combines these into the four pixels of each 2x2 tile of the output. That is 4
  multiplications for a pixel instead of 9.

:func:`form_of` chooses the form by the shapes, from measurements by
``benchmarks/convolution.py``. Arrays are ``(batch, height, width, channels)`` and kernels
``(height, width, inputs, outputs)``, of any floating dtype. The result has the same
dtype. It has derivatives of any order, forward and backward.
"""

from __future__ import annotations

import functools
import itertools
import operator
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.core import ShapedArray
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir, xla

DIMENSIONS = ("NHWC", "HWIO", "NHWC")

# F(2x2, 3x3): INPUT maps a tile, KERNEL maps a kernel, and OUTPUT maps their product.
INPUT = ((1, 0, -1, 0), (0, 1, 1, 0), (0, -1, 1, 0), (0, 1, 0, -1))
KERNEL = ((1, 0, 0), (0.5, 0.5, 0.5), (0.5, -0.5, 0.5), (0, 0, 1))
OUTPUT = ((1, 1, 1, 0), (0, 1, -1, -1))

# Fewer channels than this, such as those of an image, are too few for a matrix product.
NARROW = 16
# Up to this height and width, a map is so small that XLA's strided convolutions are slow.
SMALL = 8


class Window(NamedTuple):
    """How a kernel moves over a map: the stride of both directions and the padding of all sides."""

    stride: int
    padding: int

    def size(self, map_size: int, kernel_size: int) -> int:
        """Returns the size of the output's map."""
        return (map_size + 2 * self.padding - kernel_size) // self.stride + 1


def convolve(
    x: jax.Array, kernel: jax.Array, strides: Sequence[int], padding: Sequence[tuple[int, int]]
) -> jax.Array:
    """Convolves with zero padding, as :func:`jax.lax.conv_general_dilated` does.

    Args:
      x: ``(batch, height, width, inputs)``.
      kernel: ``(kernel height, kernel width, inputs, outputs)``, of the same dtype.
      strides: the strides in both directions, which must be equal.
      padding: the zeros before and after, in both directions, which must all be equal.

    Returns:
      ``(batch, height', width', outputs)``.
    """
    (stride,), (pad,) = set(strides), set(itertools.chain(*padding))
    window = Window(stride, pad)
    sides = (window.size(n, taps) for n, taps in zip(x.shape[1:3], kernel.shape[:2], strict=True))
    shape = (x.shape[0], *sides, kernel.shape[3])
    what = {"wanted": 2, "shape": shape, "window": window, "mapped": ()}
    y: jax.Array = PRODUCT.bind(x, kernel, **what, dimension_numbers=DIMENSION_NUMBERS)
    return y


# The sum of convolve(x, kernel) * dy is linear in x, in kernel and in dy. Its gradients with
# respect to them are the input's gradient, the kernel's gradient and the output. So each of these
# is a product of two of the three arrays, and the derivatives of such a product, forward or
# backward, are again such products. PRODUCT is the operation that computes them:
#
# - wanted: the place, among the three arrays, of the one that is computed and not given;
# - shape: the shape of the result, before any jax.vmap;
# - mapped: for each jax.vmap, from the outermost, the sizes of the axes that it puts in front of
#   the three arrays, or 0 where it puts none.
#
# Its name is that of XLA's own convolution, and so is what it says of the axes, for those who look
# for convolutions in a jaxpr.
PRODUCT = Primitive("conv_general_dilated")
ANY = (1, 1, 1, 1)
DIMENSION_NUMBERS = jax.lax.conv_dimension_numbers(ANY, ANY, ("NHWC", "HWIO", "NHWC"))
ARRAYS = ("input", "kernel", "output")


def _multiply(
    *given: jax.Array,
    wanted: int,
    shape: tuple[int, ...],
    window: Window,
    mapped: Sequence[tuple[int, ...]],
    dimension_numbers: jax.lax.ConvDimensionNumbers,
    cpu: bool,
) -> jax.Array:
    """Computes a product, in the quickest form if it is for a CPU."""
    what = ARRAYS[wanted]

    def product(*given: jax.Array) -> jax.Array:
        arrays: list[Any] = list(given)
        if what != "output":
            arrays.insert(wanted, jax.ShapeDtypeStruct(shape, given[0].dtype))
        x, kernel, *_ = arrays
        form = form_of(what, x.shape[1:3], kernel.shape, window) if cpu else "native"
        return FORMS[what][form](*arrays, window)

    for sizes in reversed(mapped):
        axes = [0 if size else None for at, size in enumerate(sizes) if at != wanted]
        product = jax.vmap(product, axes)
        if not sizes[wanted]:
            product = functools.partial(lambda every, *given: every(*given).sum(0), product)
    return product(*given)


def _abstract(
    *given: ShapedArray,
    wanted: int,
    shape: tuple[int, ...],
    mapped: Sequence[tuple[int, ...]],
    **_: Any,
) -> ShapedArray:
    """Returns the type of a product."""
    sizes = (sizes[wanted] for sizes in mapped if sizes[wanted])
    return ShapedArray((*sizes, *shape), given[0].dtype)


def _transpose(of: int, dy: jax.Array, *given: Any, wanted: int, **params: Any) -> jax.Array:
    """Returns the gradient with respect to the given array ``of``, 0 or 1."""
    arrays = list(given)
    arrays.insert(wanted, dy)
    of += of >= wanted
    shape = arrays.pop(of).aval.shape[-4:]
    gradient: jax.Array = PRODUCT.bind(*arrays, **params | {"wanted": of, "shape": shape})
    return gradient


def _batch(
    given: Sequence[jax.Array],
    axes: Sequence[int | None],
    *,
    wanted: int,
    mapped: tuple[tuple[int, ...], ...],
    **params: Any,
) -> tuple[jax.Array, int]:
    """Returns the product of mapped arrays, and the axis of it that is mapped."""
    pairs = list(zip(given, axes, strict=True))
    sizes = [0 if axis is None else a.shape[axis] for a, axis in pairs]
    sizes.insert(wanted, max(sizes))
    given = [a if axis is None else jnp.moveaxis(a, axis, 0) for a, axis in pairs]
    return PRODUCT.bind(*given, wanted=wanted, mapped=(tuple(sizes), *mapped), **params), 0


def _lowering(*, cpu: bool) -> Callable[..., Any]:
    return mlir.lower_fun(functools.partial(_multiply, cpu=cpu), multiple_results=False)


PRODUCT.def_impl(functools.partial(xla.apply_primitive, PRODUCT))
PRODUCT.def_abstract_eval(_abstract)
ad.defbilinear(PRODUCT, functools.partial(_transpose, 0), functools.partial(_transpose, 1))
batching.primitive_batchers[PRODUCT] = _batch
mlir.register_lowering(PRODUCT, _lowering(cpu=False))
mlir.register_lowering(PRODUCT, _lowering(cpu=True), platform="cpu")


def form_of(what: str, map_size: Sequence[int], kernel_shape: Sequence[int], window: Window) -> str:
    """Returns the quickest form on a CPU, as ``benchmarks/convolution.py`` measured them.

    Args:
      what: ``output``, or the argument of the gradient: ``input`` or ``kernel``.
      map_size: the height and width of the input.
      kernel_shape: the kernel's shape, with all four axes.
      window: how the kernel moves.
    """
    height, width, *channels = kernel_shape
    if min(channels) < NARROW:
        return "native"
    if (height, width) == (1, 1):
        return "taps"
    if (height, width) == (3, 3) and window.stride == 1 and window.padding <= 2:
        return "winograd" if max(map_size) > 2 else "taps"
    return "native" if what != "kernel" and max(map_size) > SMALL else "taps"


# The three forms of the output.


def native_output(x: jax.Array, kernel: jax.Array, window: Window) -> jax.Array:
    """Returns XLA's own convolution."""
    stride, padding = (window.stride,) * 2, ((window.padding,) * 2,) * 2
    return lax.conv_general_dilated(x, kernel, stride, padding, dimension_numbers=DIMENSIONS)


def taps_output(x: jax.Array, kernel: jax.Array, window: Window) -> jax.Array:
    """Sums, over the kernel's taps, the products with the pixels that each one meets."""
    y = zero = jnp.zeros((), x.dtype)
    for tap in taps(x.shape[1:3], kernel.shape[:2], window):
        y = y + lax.pad(tap.of_input(x) @ kernel[tap.place], zero, tap.around)
    return y


def winograd_output(x: jax.Array, kernel: jax.Array, window: Window) -> jax.Array:
    """Computes the output by 2x2 tiles."""
    return _winograd(x, kernel, window, inputs=0)


def _winograd(x: jax.Array, kernel: jax.Array, window: Window, inputs: int) -> jax.Array:
    """Takes axis 0 or 1 of each tap's matrix as the inputs: transposing 16 of them is slow."""
    height, width = (window.size(n, 3) for n in x.shape[1:3])
    tiles, mapped = input_tiles(x, window), _map2(KERNEL, list(map(list, kernel)))
    products = [_products(*pair, (2, inputs + 1)) for pair in zip(tiles, mapped, strict=True)]
    products = [p.reshape(*t.shape[:-1], -1) for p, t in zip(products, tiles, strict=True)]
    y = jnp.stack(_map2(OUTPUT, list(map(list, products)), axis=3), axis=2)
    batch, rows, _, columns, _, outputs = y.shape
    return y.reshape(batch, 2 * rows, 2 * columns, outputs)[:, :height, :width]


# The three forms of the input's gradient.


def native_input_gradient(
    x: jax.Array, kernel: jax.Array, dy: jax.Array, window: Window
) -> jax.Array:
    """Returns XLA's own gradient. Only the shape of ``x`` matters."""
    dx: jax.Array = jax.linear_transpose(lambda x: native_output(x, kernel, window), x)(dy)[0]
    return dx


def taps_input_gradient(
    x: jax.Array, kernel: jax.Array, dy: jax.Array, window: Window
) -> jax.Array:
    """Sums what each tap passes back to the pixels that it met."""
    dx = zero = jnp.zeros((), dy.dtype)
    for tap in taps(x.shape[1:3], kernel.shape[:2], window):
        dx = dx + lax.pad(tap.of_output(dy) @ kernel[tap.place].T, zero, tap.spread)
    return dx


def winograd_input_gradient(
    x: jax.Array, kernel: jax.Array, dy: jax.Array, window: Window
) -> jax.Array:
    """Convolves the gradient with the kernel rotated by half a turn."""
    return _winograd(dy, kernel[::-1, ::-1], Window(1, 2 - window.padding), inputs=1)


# The three forms of the kernel's gradient.


def native_kernel_gradient(
    x: jax.Array, kernel: jax.Array, dy: jax.Array, window: Window
) -> jax.Array:
    """Returns XLA's own gradient. Only the shape of ``kernel`` matters."""
    dk: jax.Array = jax.linear_transpose(lambda kernel: native_output(x, kernel, window), kernel)(
        dy
    )[0]
    return dk


def taps_kernel_gradient(
    x: jax.Array, kernel: jax.Array, dy: jax.Array, window: Window
) -> jax.Array:
    """Multiplies, for each tap, the input pixels that it met by the gradients of its outputs."""
    found = [
        _over_pixels(tap.of_input(x), tap.of_output(dy))
        for tap in taps(x.shape[1:3], kernel.shape[:2], window)
    ]
    return jnp.stack(found).reshape(kernel.shape)


def winograd_kernel_gradient(
    x: jax.Array, kernel: jax.Array, dy: jax.Array, window: Window
) -> jax.Array:
    """Returns the transpose of :func:`winograd_output`, which is linear in the kernel."""
    tiles = input_tiles(x, window)
    rows, columns = tiles[0].shape[2:4]
    dy = lax.optimization_barrier(_pad_to(dy, 2 * rows, 2 * columns))
    phases = [[dy[:, i::2, j::2] for j in range(2)] for i in range(2)]
    mapped = _map2(_transposed(OUTPUT), phases)
    products = [_products(*pair, (1, 1)) for pair in zip(tiles, mapped, strict=True)]
    return jnp.stack(_map2(_transposed(KERNEL), list(map(list, products))))


# Shared by the forms.


class Tap(NamedTuple):
    """One tap of a kernel, and the pixels that meet it.

    Attributes:
      place: the tap's row and column in the kernel.
      inputs: the pixels of the input, as ``(start, stop, step)`` for both directions.
      outputs: the pixels of the output, likewise, with steps of 1.
      around: the configuration of :func:`jax.lax.pad` that puts ``outputs`` into a whole output.
      spread: the configuration that puts ``inputs`` into a whole input.
    """

    place: tuple[int, ...]
    inputs: tuple[tuple[int, int, int], ...]
    outputs: tuple[tuple[int, int, int], ...]
    around: tuple[tuple[int, int, int], ...]
    spread: tuple[tuple[int, int, int], ...]

    def of_input(self, x: jax.Array) -> jax.Array:
        """Returns the pixels of the input that meet the tap."""
        rows, columns = self.inputs
        return x[:, slice(*rows), slice(*columns)]

    def of_output(self, y: jax.Array) -> jax.Array:
        """Returns the pixels of the output to which they contribute."""
        rows, columns = self.outputs
        return y[:, slice(*rows), slice(*columns)]


def taps(map_size: Sequence[int], kernel_size: Sequence[int], window: Window) -> Iterator[Tap]:
    """Yields the taps of a kernel, row by row."""
    for place in itertools.product(*map(range, kernel_size)):
        inputs, outputs, around, spread = [], [], [(0, 0, 0)], [(0, 0, 0)]
        for at, size, taps in zip(place, map_size, kernel_size, strict=True):
            whole = window.size(size, taps)
            shift = at - window.padding
            first = min(max(0, -(shift // window.stride)), whole)
            stop = max(first, min(whole, (size - 1 - shift) // window.stride + 1))
            start = first * window.stride + shift
            end = max(start, start + (stop - first - 1) * window.stride + 1)
            inputs.append((start, end, window.stride))
            outputs.append((first, stop, 1))
            around.append((first, whole - stop, 0))
            spread.append((start, size - end, window.stride - 1))
        yield Tap(place, tuple(inputs), tuple(outputs), (*around, (0, 0, 0)), (*spread, (0, 0, 0)))


def input_tiles(x: jax.Array, window: Window) -> list[jax.Array]:
    """Returns the mapped 4x4 tiles: 4 arrays ``(4, batch, tile rows, tile columns, inputs)``."""
    rows, columns = (-(-window.size(n, 3) // 2) for n in x.shape[1:3])
    x = _pad_to(x, 2 * rows + 2, 2 * columns + 2, before=window.padding)
    # Without the barrier, XLA fuses the computation of x into each of the four and repeats it.
    x = lax.optimization_barrier(x)
    pixels = [
        [x[:, i : i + 2 * rows : 2, j : j + 2 * columns : 2] for j in range(4)] for i in range(4)
    ]
    return _map2(INPUT, pixels)


def _map2(
    matrix: Sequence[Sequence[float]], grid: list[list[jax.Array]], axis: int = 0
) -> list[jax.Array]:
    """Computes ``matrix @ grid @ matrix.T`` for a grid of arrays.

    Returns:
      The rows, each with a new axis for the columns. Sixteen separate arrays would be a little
      quicker, but each use would then have sixteen loops to compile.
    """
    rows = [[_combine(weights, column) for column in zip(*grid, strict=True)] for weights in matrix]
    return [_mix(matrix, row, axis) for row in rows]


def _combine(weights: Sequence[float], arrays: Sequence[jax.Array]) -> jax.Array:
    terms = (a if w == 1 else w * a for w, a in zip(weights, arrays, strict=True) if w)
    return functools.reduce(operator.add, terms)


def _mix(matrix: Sequence[Sequence[float]], arrays: list[jax.Array], axis: int) -> jax.Array:
    """Returns ``matrix @ arrays``, with a new axis."""
    others = [i for i in range(arrays[0].ndim + 1) if i != axis]
    weights = np.expand_dims(np.array(matrix).T, [i + 1 for i in others])
    terms = (
        jnp.asarray(w, a.dtype) * jnp.expand_dims(a, axis)
        for w, a in zip(weights, arrays, strict=True)
    )
    return functools.reduce(operator.add, terms)


def _products(x: jax.Array, y: jax.Array, contracted: tuple[int, int]) -> jax.Array:
    """Multiplies 4 pairs of matrices, over one axis of each. The pixels of tiles are one axis."""
    x, y = (a.reshape(4, -1, a.shape[-1]) for a in (x, y))
    first, second = contracted
    return lax.dot_general(x, y, (((first,), (second,)), ((0,), (0,))))


def _transposed(matrix: Sequence[Sequence[float]]) -> list[tuple[float, ...]]:
    return list(zip(*matrix, strict=True))


def _pad_to(x: jax.Array, height: int, width: int, before: int = 0) -> jax.Array:
    """Pads maps with zeros to a given size, with ``before`` of them above and to the left."""
    _, rows, columns, _ = x.shape
    sides = (before, height - before - rows, 0), (before, width - before - columns, 0)
    return lax.pad(x, jnp.zeros((), x.dtype), ((0, 0, 0), *sides, (0, 0, 0)))


def _over_pixels(x: jax.Array, y: jax.Array) -> jax.Array:
    """Sums outer products over pixels, to ``(inputs, outputs)``."""
    # As matrices, since with more axes XLA would transpose the first array before the product.
    x, y = (a.reshape(-1, a.shape[-1]) for a in (x, y))
    return lax.dot_general(x, y, (((0,), (0,)), ((), ())))


FORMS: dict[str, dict[str, Callable[..., jax.Array]]] = {
    "output": {"native": native_output, "taps": taps_output, "winograd": winograd_output},
    "input": {
        "native": native_input_gradient,
        "taps": taps_input_gradient,
        "winograd": winograd_input_gradient,
    },
    "kernel": {
        "native": native_kernel_gradient,
        "taps": taps_kernel_gradient,
        "winograd": winograd_kernel_gradient,
    },
}
