"""Reading again what the system could not read at first."""

import time
from collections.abc import Callable, Iterable
from typing import TypeVar

T = TypeVar("T")


def patiently(
    read: Callable[[], T], seconds: Iterable[float], may_pass: Callable[[Exception], bool]
) -> T:
    """Calls a function, and again after each of the waits if it fails for a reason that may pass.

    Args:
      read: the function. What it raises at last is raised as it is.
      seconds: how long to wait before each further call.
      may_pass: whether another call may do better after this error.
    """
    for wait in seconds:
        try:
            return read()
        except Exception as error:
            if not may_pass(error):
                raise
        time.sleep(wait)
    return read()
