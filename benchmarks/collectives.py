"""What a compiled program sends between devices, read from its text."""

import math
import re
from collections.abc import Iterator
from typing import NamedTuple

KINDS = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")
BYTES = {"pred": 1, "s32": 4, "u32": 4, "s64": 8, "u8": 1, "bf16": 2, "f32": 4, "f64": 8}


class Collective(NamedTuple):
    """A collective of a program.

    Attributes:
      kind: one of :data:`KINDS`.
      size: the bytes of the whole array on one device: what a gather results in, and what a
        reduce-scatter begins with.
      devices: how many exchange it among themselves.
      times: how often it runs, in a loop.
    """

    kind: str
    size: int
    devices: int
    times: int

    @property
    def sent(self) -> float:
        """The bytes that a device sends each time, if the devices are a ring."""
        if self.kind == "collective-permute":
            return self.size
        # A reduction sums the parts on their way around, and hands the sums around after that.
        rounds = 2 if self.kind == "all-reduce" else 1
        return rounds * (self.devices - 1) / self.devices * self.size


def of_program(hlo: str, devices: int) -> list[Collective]:
    """Returns the collectives of a compiled program.

    One that XLA has spread over several others, to send while these compute, counts once, as
    its channel says.

    Args:
      hlo: the text of the program.
      devices: how many devices it is for.
    """
    bodies = _computations(hlo)
    found, channels = [], set()

    def visit(name: str, times: int) -> None:
        for line in bodies[name]:
            if collective := _of_line(line, name, devices, times):
                channel = re.search(r"channel_id=(\d+)", line)
                key = channel and (collective.kind, channel[1])
                if key is None or key not in channels:
                    found.append(collective)
                    channels.add(key)
            rounds = times * _trip_count(line, bodies)
            for callee in _callees(line):
                visit(callee, rounds)

    visit("ENTRY", 1)
    return found


def count(collectives: list[Collective]) -> dict[str, tuple[int, int]]:
    """Returns how many there are of each kind, and their bytes together."""
    totals: dict[str, tuple[int, int]] = {}
    for kind, size, _, times in collectives:
        number, total = totals.get(kind, (0, 0))
        totals[kind] = number + times, total + times * size
    return totals


def _computations(hlo: str) -> dict[str, list[str]]:
    """Maps the name of each computation to its lines; that of the program is ``ENTRY``."""
    bodies: dict[str, list[str]] = {}
    lines: list[str] = []
    for line in hlo.splitlines():
        if head := re.match(r"(ENTRY )?%?([\w.-]+) \(.*\{$", line):
            lines = bodies.setdefault("ENTRY" if head[1] else head[2], [])
        else:
            lines.append(line)
    return bodies


def _callees(line: str) -> Iterator[str]:
    """Names the computations that an instruction runs."""
    for names in re.findall(r"(?:calls|body|branch_computations)=(\{[^}]*\}|%?[\w.-]+)", line):
        yield from re.findall(r"[\w.-]+", names)


def _trip_count(line: str, bodies: dict[str, list[str]]) -> int:
    """Returns how often a loop runs, which counts from zero to a constant; 1 if it is no loop."""
    condition = re.search(r" while\(.* condition=%?([\w.-]+)", line)
    if not condition:
        return 1
    text = "\n".join(bodies[condition[1]])
    limits = re.findall(r"= [su]32\[\]\S* constant\((\d+)\)", text)
    return int(limits[0]) if len(limits) == 1 and "direction=LT" in text else 1


def _of_line(line: str, computation: str, devices: int, times: int) -> Collective | None:
    found = re.search(rf"= (.+?) ({'|'.join(KINDS)})(-start)?\(", line)
    if not found:
        return None
    result, kind, start = found.groups()
    arrays = [
        BYTES[dtype] * math.prod(int(n) for n in shape.split(",") if n)
        for dtype, shape in re.findall(r"(\w+)\[([\d,]*)\]", result)
    ]
    if start and kind == "collective-permute":
        # The operand, the result and two numbers.
        arrays = arrays[1:2]
    elif start and kind == "all-gather":
        # Operands, then results.
        arrays = arrays[len(arrays) // 2 :]
    group = _group_size(line) or devices
    size = sum(arrays) * (group if kind == "reduce-scatter" else 1)
    if computation.startswith("all-reduce-scatter"):
        # How a TPU's program says it: a reduction of which a device keeps its share.
        kind = "reduce-scatter"
    return Collective(kind, size, group, times)


def _group_size(line: str) -> int | None:
    """Returns how many devices take part, in any of the ways in which XLA writes their groups."""
    if mesh := re.search(r"replica_groups=mesh\[(.*?)\] \{(.*?)\}", line):
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", mesh[1]))
        # A part of an axis has a size of its own: 'a':(2)4.
        axes = re.findall(r"'(\w+)'(?::\(\d+\)(\d+))?", mesh[2])
        return math.prod(int(part or sizes[axis]) for axis, part in axes)
    if shape := re.search(r"replica_groups=\[\d+,(\d+)\]<=", line):
        return int(shape[1])
    if first := re.search(r"replica_groups=\{\{([\d,]+)\}", line):
        return first[1].count(",") + 1
    return None
