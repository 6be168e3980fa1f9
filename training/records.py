"""What a run remembers of itself: typed here, and checked when it is read from JSON."""

from __future__ import annotations

import dataclasses
import math
import types
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

T = TypeVar("T")


@dataclass(frozen=True)
class EpochRecord:
    """One epoch: a line of ``metrics.jsonl``.

    Attributes:
      epoch: its number, the first being 1.
      step: the number of steps taken at its end.
      train_loss: the mean loss of its training batches, each before its step.
      train_accuracy: their accuracy, 0 to 1.
      test_loss: the mean loss over the test set at its end.
      test_accuracy: the accuracy over the test set, 0 to 1.
      eta: the mean automatic learning rate.
      eta_min: the smallest.
      eta_max: the largest.
      gradient_summary: the mean gradient summary G.
      seconds: how long its training steps took.
      images_per_second: how many training images were seen in that time.
      unreadable: how many images could not be read, for data that are streamed.
    """

    epoch: int
    step: int
    train_loss: float
    train_accuracy: float
    test_loss: float
    test_accuracy: float
    eta: float
    eta_min: float
    eta_max: float
    gradient_summary: float
    seconds: float
    images_per_second: float
    unreadable: int | None = None

    def to_json(self) -> dict[str, int | float]:
        """The fields by name, without those that do not apply."""
        fields = dataclasses.asdict(self)
        return {name: value for name, value in fields.items() if value is not None}


def best(records: Sequence[EpochRecord]) -> EpochRecord:
    """The first of the records, of which there is one at least, with the highest test accuracy."""
    # Not a number, where no test image could be read, is worse than anything.
    return max(records, key=lambda r: -1 if math.isnan(r.test_accuracy) else r.test_accuracy)


def best_step(records: Sequence[EpochRecord], steps: set[int]) -> int | None:
    """The one of these steps that ended the epoch with the best test accuracy, if any ended one."""
    ended = [record for record in records if record.step in steps]
    return best(ended).step if ended else None


def from_json(cls: type[T], fields: object) -> T:
    """Makes a dataclass of an object of JSON, which anybody may have written.

    Raises:
      ValueError: if a field is missing, unknown or of another type.
    """
    if not isinstance(fields, dict):
        raise ValueError(f"is {type(fields).__name__} and no object of JSON")
    hints = get_type_hints(cls)
    for name, value in fields.items():
        if name not in hints or not _fits(value, hints[name]):
            raise ValueError(f"has {name}={value!r}, which is unknown or of another type")
    try:
        return cls(**fields)
    except TypeError as error:  # A field is missing.
        raise ValueError(str(error)) from error


def _fits(value: Any, hint: Any) -> bool:
    if get_origin(hint) in (Union, types.UnionType):
        return any(_fits(value, each) for each in get_args(hint))
    # A whole number is no other than a real one, in JSON.
    return isinstance(value, int | float if hint is float else get_origin(hint) or hint)
