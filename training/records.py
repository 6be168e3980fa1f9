"""The records of a run."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class EpochRecord:
    """One epoch: a line of ``metrics.jsonl``.

    Attributes:
      epoch: the number of the epoch, counted from 1.
      step: the number of steps taken by the end of the epoch.
      train_loss: the mean loss of the training batches, each before its step.
      train_accuracy: the accuracy on the training batches, 0 to 1, each before its step.
      test_loss: the mean loss over the test set at the end of the epoch.
      test_accuracy: the accuracy over the test set, 0 to 1.
      eta: the mean of eta, the automatic learning rate.
      eta_min: the smallest eta.
      eta_max: the largest eta.
      gradient_summary: the mean gradient summary G.
      seconds: the time that the training steps took, in seconds.
      images_per_second: the number of training images per second of that time.
      unreadable: the number of images that could not be read; only for streamed data.
      plain_test_loss: the mean loss over the test set of the network without averaging; only with
        ``--average``, where ``test_loss`` and ``test_accuracy`` are those of the averaged network.
      plain_test_accuracy: its accuracy over the test set, 0 to 1.
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
    plain_test_loss: float | None = None
    plain_test_accuracy: float | None = None

    def to_json(self) -> dict[str, int | float]:
        """Returns the fields by name, without those that do not apply."""
        fields = dataclasses.asdict(self)
        return {name: value for name, value in fields.items() if value is not None}


def best(records: Sequence[EpochRecord]) -> EpochRecord:
    """Returns the first record with the highest test accuracy, of one record or more."""
    # NaN, where no test image could be read, ranks below everything.
    return max(records, key=lambda r: -1 if math.isnan(r.test_accuracy) else r.test_accuracy)


def best_step(records: Sequence[EpochRecord], steps: set[int]) -> int | None:
    """Returns the given step that ended the epoch of best test accuracy; None if none ended one."""
    ended = [record for record in records if record.step in steps]
    return best(ended).step if ended else None
