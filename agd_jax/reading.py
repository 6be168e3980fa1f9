"""How a program uses each of its parameters, and how deep it is, read from its jaxpr.

A traced program says which axes of a parameter it contracts, which become outputs and which it goes
over one by one, whatever the framework and whatever the parameters are called. The walk follows
each parameter through transposes, reshapes, casts and calls to the operations that use it on data,
and adds up their influence on the way of the data: see :class:`Data`.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple, TypeGuard

import jax
from jax.extend import core


class Factor(NamedTuple):
    """A factor of an axis of a parameter, which is seen as ``(outer, size, rest)``.

    An axis that no reshape splits is one factor, with ``outer == 1``. An axis that a broadcast has
    added is one of axis -1.
    """

    axis: int
    outer: int
    size: int


# An axis of a value: the factors of a parameter's axes that are merged in it.
Axis = tuple[Factor, ...]


class Use(NamedTuple):
    """One way in which a parameter is used, as factors of its axes.

    Attributes:
      kind: ``matrix``, ``convolution``, ``lookup``, ``offset`` or ``scale``.
      inputs: what is contracted with data; of a lookup, what is looked up.
      outputs: what the result has instead.
      taps: the spatial axes of a convolution's kernel.
      layers: what is gone over one by one: layers of a scan, experts, a batch of matrices.
      sliced: axes of which this use sees one slice.
      groups: into how many groups a convolution splits its channels.
    """

    kind: str
    inputs: Axis = ()
    outputs: Axis = ()
    taps: Axis = ()
    layers: Axis = ()
    sliced: Axis = ()
    groups: int = 1


class Tracked(NamedTuple):
    """A value that is a parameter, seen in another way.

    Attributes:
      parameter: its number among the leaves of the tree.
      axes: the axes of the value.
      layers: what was gone over on the way here.
      sliced: axes that were sliced on the way here.
    """

    parameter: int
    axes: tuple[Axis, ...]
    layers: Axis = ()
    sliced: Axis = ()

    def factors(self, positions: Iterable[int]) -> Axis:
        """Returns the factors of some axes of the value."""
        return tuple(f for position in positions for f in self.axes[position] if f.axis >= 0)

    def use(self, kind: str, **roles: Any) -> Use:
        """Returns a use of the parameter."""
        return Use(kind, sliced=self.sliced, **{"layers": self.layers} | roles)


class Data(NamedTuple):
    """A value that depends on the inputs.

    Attributes:
      influence: by the number of each parameter that it depends on: by how much of its size the
        value changes, to first order, where the parameter changes by all of its own. That is one
        for each use in series. Of a sum it is the mean over all of its terms, as if they were of
        one size: what is added to a residual stream of many counts for one of many. Where other
        operations join several values, it is the largest.
      terms: of how many the value is the sum.
    """

    influence: Mapping[int, float]
    terms: int


INPUT = Data({}, 1)

# What is known of a value: that it is one or more parameters; that it is data; or None, if it is a
# constant or depends on parameters alone, but is none of them.
Value = tuple[Tracked, ...] | Data | None


def is_parameters(value: Value) -> TypeGuard[tuple[Tracked, ...]]:
    """Whether a value is one or more parameters."""
    return isinstance(value, tuple) and not isinstance(value, Data)


def data_of(values: Iterable[Value]) -> list[Data]:
    """Returns those values that are data."""
    return [value for value in values if isinstance(value, Data)]


def through(values: Iterable[Value], parameters: Iterable[int] = ()) -> Data:
    """Returns what comes of an operation on values, and on parameters with these numbers."""
    data = data_of(values) or [INPUT]
    influence = dict(data[0].influence)
    for one in data[1:]:
        influence |= {k: max(a, influence.get(k, 0.0)) for k, a in one.influence.items()}
    for parameter in parameters:
        influence[parameter] = influence.get(parameter, 0.0) + 1.0
    return Data(influence, max(one.terms for one in data))


def sum_of(data: Sequence[Data]) -> Data:
    """Returns the sum of data."""
    terms = sum(one.terms for one in data)
    influence: dict[int, float] = {}
    for one in data:
        for parameter, its in one.influence.items():
            influence[parameter] = influence.get(parameter, 0.0) + its * one.terms / terms
    return Data(influence, terms)


# Operations whose result is their first operand, perhaps with other entries.
_SAME = {
    *("convert_element_type", "copy", "copy_p", "stop_gradient", "sharding_constraint", "reshard"),
    *("optimization_barrier", "reduce_precision", "rev", "neg", "real"),
}
_SUMS = {"add", "sub", "add_any", "concatenate", "select_n", "dynamic_update_slice"}
_PRODUCTS = {"mul", "div"}


class Reading(NamedTuple):
    """What was found.

    Attributes:
      uses: for each parameter, how often it is used in which way.
      stopped: for each parameter, the operations at which it could not be followed.
      influence: for each parameter, its influence on the results of the program.
    """

    uses: list[Counter[Use]]
    stopped: list[list[str]]
    influence: Sequence[float] = ()

    @staticmethod
    def of(count: int) -> Reading:
        """Returns an empty one, of so many parameters."""
        return Reading([Counter() for _ in range(count)], [[] for _ in range(count)])

    def stop(self, value: Value, operation: str) -> None:
        """Notes that parameters cannot be followed through an operation."""
        for tracked in value if is_parameters(value) else ():
            if operation not in self.stopped[tracked.parameter]:
                self.stopped[tracked.parameter].append(operation)


def read(apply: Callable[..., Any], params: Any, *inputs: Any) -> Reading:
    """Reads how ``apply(params, *inputs)`` uses the leaves of ``params``; computes nothing.

    Args:
      apply: a function that JAX can trace.
      params: a tree of arrays or of their shapes.
      inputs: examples of its other arguments, or their shapes.
    """
    closed = jax.make_jaxpr(apply)(params, *inputs)
    shapes = [leaf.shape for leaf in jax.tree.leaves(params)]
    reading = Reading.of(len(shapes))
    values: list[Value] = [
        (Tracked(index, tuple(_axis(axis, size) for axis, size in enumerate(shape))),)
        for index, shape in enumerate(shapes)
    ]
    values += [INPUT] * (len(closed.jaxpr.invars) - len(shapes))
    results = _walk(closed.jaxpr, values, reading)
    for value in results:
        reading.stop(value, "the result")
    influence = through(results).influence
    return reading._replace(influence=[influence.get(i, 0.0) for i in range(len(shapes))])


def _axis(axis: int, size: int) -> Axis:
    return (Factor(axis, 1, size),) if size != 1 else ()


def _walk(jaxpr: Any, values: Sequence[Value], reading: Reading) -> list[Value]:
    """Follows values through a program, adds to the reading, and returns its results."""
    known: dict[Any, Value] = dict(zip(jaxpr.invars, values, strict=True))

    def value(variable: Any) -> Value:
        return None if isinstance(variable, core.Literal) else known.get(variable)

    for equation in jaxpr.eqns:
        results = _step(equation, [value(v) for v in equation.invars], reading)
        known.update(zip(equation.outvars, results, strict=True))
    return [value(variable) for variable in jaxpr.outvars]


def _step(equation: Any, operands: list[Value], reading: Reading) -> list[Value]:
    """Returns what the results of an equation are."""
    name, params, count = equation.primitive.name, equation.params, len(equation.outvars)
    if name == "scan":
        body = _open(params["jaxpr"])
        # What JAX says of the three kinds of operands differs between its versions. What is carried
        # has the same axes within and without, what is gone over has one more without.
        carried = sum(map(_alike, equation.outvars, body.outvars))
        scanned = len(body.invars) - sum(map(_alike, equation.invars, body.invars))
        constants = len(body.invars) - carried - scanned
        return _loop(body, operands, constants, carried, reading, params["length"])
    if name == "while":
        body = _open(params["body_jaxpr"])
        own = operands[params["cond_nconsts"] :]
        return _loop(body, own, params["body_nconsts"], len(body.outvars), reading)
    if name == "cond":
        found = [_walk(_open(branch), operands[1:], reading) for branch in params["branches"]]
        # What is one parameter or another can be seen as both.
        return [_together(values, reading, name) for values in zip(*found, strict=True)]
    for key in ("jaxpr", "call_jaxpr", "fun_jaxpr"):
        inner = _open(params.get(key))
        if inner is not None and len(inner.invars) == len(operands):
            return _walk(inner, operands, reading)
    if any(map(is_parameters, operands)):
        return [_apply(equation, operands, reading)] * count
    data = data_of(operands)
    if not data:
        return [None] * count
    if name in ("add", "add_any"):
        return [sum_of(data)]
    # A product of data is one term, as a gated or normalised sum is.
    product = name in ("mul", "div", "dot_general", "conv_general_dilated") and len(data) > 1
    result = through(data)
    return [result._replace(terms=1) if product else result] * count


def _open(jaxpr: Any) -> Any:
    """Returns a program without its constants, which some versions of JAX keep beside it."""
    return getattr(jaxpr, "jaxpr", jaxpr)


def _alike(outer: Any, inner: Any) -> bool:
    return bool(outer.aval.ndim == inner.aval.ndim)


def _together(values: Sequence[Value], reading: Reading, name: str) -> Value:
    """Returns what a value is that is one of several."""
    parts = tuple(t for value in values if is_parameters(value) for t in value)
    if not data_of(values):
        return parts or None
    reading.stop(parts, name)
    return through(values)


def _loop(
    body: Any,
    operands: list[Value],
    constants: int,
    carried: int,
    reading: Reading,
    length: int = 1,
) -> list[Value]:
    """Follows values through a loop: of what it goes over, the first axis counts layers."""
    slices: list[Value] = [
        tuple(t._replace(axes=t.axes[1:], layers=t.layers + t.factors([0])) for t in value)
        if is_parameters(value)
        else value
        for value in operands[constants + carried :]
    ]
    carry = operands[constants : constants + carried]
    for i, value in enumerate(carry):
        if is_parameters(value) and body.outvars[i] is not body.invars[constants + i]:
            # Where a loop begins with a parameter and goes on with something else, it is a vector
            # that is learned.
            for tracked in value:
                reading.uses[tracked.parameter][_everything(tracked, "offset")] += 1
            carry[i] = INPUT

    def once(carry: list[Value], reading: Reading) -> list[Value]:
        return _walk(body, [*operands[:constants], *carry, *slices], reading)

    while True:
        results = once(carry, Reading.of(len(reading.uses)))
        # What is a constant at first may come to depend on data.
        after = [
            then if now is None and isinstance(then, Data) else now
            for now, then in zip(carry, results, strict=False)
        ]
        if [type(value) for value in after] == [type(value) for value in carry]:
            break
        carry = after
    results = once(carry, reading)
    # Where it goes over parameters, each round is a layer. Steps in time use the same ones again.
    for _ in range(length - 1 if any(map(is_parameters, slices)) else 0):
        carry = [
            now if is_parameters(now) or now is None else then
            for now, then in zip(carry, results, strict=False)
        ]
        results = once(carry, Reading.of(len(reading.uses)))
    for value in results[carried:]:
        reading.stop(value, "the result of a loop")
    return [
        start if is_parameters(start) else through([value]) if value is not None else None
        for start, value in zip([*carry, *results[carried:]], results, strict=True)
    ]


def _everything(one: Tracked, kind: str) -> Use:
    """Returns a use of all axes together."""
    return one.use(kind, outputs=one.factors(range(len(one.axes))))


def _apply(equation: Any, operands: list[Value], reading: Reading) -> Value:
    """Follows parameters through an operation, or notes how it uses them on data."""
    name, params = equation.primitive.name, equation.params
    shape, mixed = equation.invars[0].aval.shape, bool(data_of(operands))
    holders = [i for i, value in enumerate(operands) if is_parameters(value)]
    alone, first = len(holders) == 1, holders[0]
    tracked = [one for i in holders for one in operands[i] or () if isinstance(one, Tracked)]

    def used(use: Callable[[Tracked], Use]) -> Data:
        for one in tracked:
            reading.uses[one.parameter][use(one)] += 1
        return through(operands, {one.parameter for one in tracked})._replace(terms=1)

    def moved(move: Callable[[Tracked], Tracked | None]) -> Value:
        results = [result for one in tracked if (result := move(one)) is not None]
        return tuple(results) if len(results) == len(tracked) else lost()

    def lost() -> Value:
        for value in operands:
            reading.stop(value, name if alone else f"{name} of two parameters")
        return through(operands) if mixed else None

    if name in _SAME and alone:
        return tuple(tracked)
    if name == "transpose":
        return moved(
            lambda one: one._replace(axes=tuple(one.axes[i] for i in params["permutation"]))
        )
    if name in ("reshape", "squeeze", "expand_dims"):
        return moved(lambda one: _reshaped(one, shape, equation.outvars[0].aval.shape))
    if name == "broadcast_in_dim":
        return moved(lambda one: _broadcast(one, shape, params))
    if (name == "slice" and params["strides"] is None) or (
        name == "split" and len(set(params["sizes"])) == 1
    ):
        sizes = equation.outvars[0].aval.shape
        return moved(lambda one: _sliced(one, shape, sizes, "sliced"))
    if name == "dynamic_slice" and first == 0 and not mixed:
        return moved(lambda one: _sliced(one, shape, params["slice_sizes"], "layers"))
    if name == "dynamic_slice" and first == 0:
        pairs = enumerate(zip(shape, params["slice_sizes"], strict=True))
        rows = [i for i, (whole, part) in pairs if whole != part]
        return used(lambda one: _lookup(one, rows, []))
    if name == "gather" and first == 0 and alone:
        numbers = params["dimension_numbers"]
        rows, batch = numbers.start_index_map, numbers.operand_batching_dims
        return used(lambda one: _lookup(one, rows, batch))
    if name == "dot_general" and alone:
        return used(lambda one: _product(one, params["dimension_numbers"], first))
    if name == "conv_general_dilated" and alone and first == 1:
        return used(lambda one: _convolution(one, params))
    if name in _SUMS and mixed:
        # It is none of the terms, as it starts at zero.
        terms = through(operands).terms
        return used(lambda one: _everything(one, "offset"))._replace(terms=terms)
    if name in _PRODUCTS and alone and mixed and (name == "mul" or first == 1):
        return used(lambda one: _everything(one, "scale"))
    # A sum of parameters is each of them. Times a constant, a parameter remains what it is.
    if not mixed and (
        name in _SUMS or (name in _PRODUCTS and alone and first == 0) or (name == "mul" and alone)
    ):
        return tuple(tracked)
    return lost()


def _reshaped(one: Tracked, shape: Sequence[int], new: Sequence[int]) -> Tracked | None:
    """Merges and splits axes; returns None where a new axis has a part of one that is no factor."""
    if any(math.prod(f.size for f in axis) != n for axis, n in zip(one.axes, shape, strict=True)):
        return None
    left = [factor for axis in one.axes for factor in axis]
    axes: list[Axis] = []
    for size in new:
        axis: list[Factor] = []
        while size > 1:
            whole = left.pop(0)
            if size % whole.size == 0:
                part = whole
            elif whole.size % size == 0:
                part = whole._replace(size=size)
                rest = whole.size // size
                left.insert(0, whole._replace(outer=whole.outer * size, size=rest))
            else:
                return None
            axis.append(part)
            size //= part.size
        axes.append(tuple(axis))
    return one._replace(axes=tuple(axes))


def _broadcast(one: Tracked, shape: Sequence[int], params: dict[str, Any]) -> Tracked:
    """Adds axes, of which the parameter has none."""
    axes: list[Axis] = [(Factor(-1, 1, n),) if n != 1 else () for n in params["shape"]]
    for i, position in enumerate(params["broadcast_dimensions"]):
        if shape[i] == params["shape"][position]:
            axes[position] = one.axes[i]
    return one._replace(axes=tuple(axes))


def _sliced(one: Tracked, shape: Sequence[int], sizes: Sequence[int], role: str) -> Tracked | None:
    """Splits off which slice of an axis is taken; returns None if slices do not fill the axis."""
    axes, taken = list(one.axes), getattr(one, role)
    for i, (whole, part) in enumerate(zip(shape, sizes, strict=True)):
        if whole == part:
            continue
        if whole % part or [f.size for f in axes[i]] != [whole]:
            return None
        (factor,) = axes[i]
        count = whole // part
        taken += (factor._replace(size=count),) if factor.axis >= 0 else ()
        rest = factor._replace(outer=factor.outer * count, size=part)
        axes[i] = (rest,) if part > 1 else ()
    return one._replace(axes=tuple(axes), **{role: taken})


def _product(one: Tracked, numbers: Any, position: int) -> Use:
    """Returns the use by ``dot_general``: what is contracted are the inputs."""
    contracted, batch = (part[position] for part in numbers)
    rest = [i for i in range(len(one.axes)) if i not in (*contracted, *batch)]
    layers = one.layers + one.factors(batch)
    roles = {"inputs": one.factors(contracted), "outputs": one.factors(rest), "layers": layers}
    return one.use("matrix", **roles)


def _convolution(one: Tracked, params: dict[str, Any]) -> Use:
    """Returns the use by ``conv_general_dilated``, whose kernel has axes of three kinds."""
    outputs, inputs, *taps = params["dimension_numbers"].rhs_spec
    return one.use(
        "convolution",
        inputs=one.factors([inputs]),
        outputs=one.factors([outputs]),
        taps=one.factors(taps),
        groups=params.get("feature_group_count", 1) * params.get("batch_group_count", 1),
    )


def _lookup(one: Tracked, rows: Sequence[int], batch: Sequence[int]) -> Use:
    """Returns the use by ``gather``, which takes rows."""
    rest = [i for i in range(len(one.axes)) if i not in (*rows, *batch)]
    layers = one.layers + one.factors(batch)
    return one.use("lookup", inputs=one.factors(rows), outputs=one.factors(rest), layers=layers)
