"""The names of classes, so that a label means the same in every folder."""

from collections.abc import Iterable, Sequence

from input_pipeline.errors import DataError


def are_numbers(names: Iterable[str]) -> bool:
    """Returns whether all names are numbers."""
    return all(map(str.isdecimal, names))


def ordered(names: Iterable[str]) -> list[str]:
    """Returns the names in order: that of the numbers if all are numbers, else of the alphabet."""
    found = sorted(names)
    return sorted(found, key=int) if are_numbers(found) else found


def labels(names: Sequence[str], known: Sequence[str], origin: str) -> list[int]:
    """Returns the label of each class.

    Args:
      names: the classes of a data set.
      known: those that a network was trained on, in the order of its labels; if there are none, the
        labels are the places in ``names``.
      origin: where the data set is from, as the error says it.

    Raises:
      DataError: if a class is not known.
    """
    places = {name: label for label, name in enumerate(known or names)}
    if unknown := [name for name in names if name not in places]:
        raise DataError(
            f"{origin}: has classes that this run was not trained on: {', '.join(unknown[:5])}"
            + (f" and {len(unknown) - 5} more" if len(unknown) > 5 else "")
            + f"; it knows {', '.join(known[:5])}"
            + (f" and {len(known) - 5} more" if len(known) > 5 else "")
        )
    return [places[name] for name in names]
