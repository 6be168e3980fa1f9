"""How the process takes memory from the system, and gives it back."""

import ctypes

# Of mallopt(3), in glibc's malloc.h.
TRIM_THRESHOLD, MMAP_MAX, ARENA_MAX = -1, -4, -8
NEVER = 2**31 - 1


def keep_freed_memory() -> None:
    """Makes the C library keep what is freed for what is asked for next, where it is glibc.

    XLA asks for the intermediate arrays of a program, hundreds of megabytes, each time that it
    runs on a CPU. By default glibc gives so much back to the system at once, which then clears
    page after page for the next step: a quarter of a step of `resnet18` went by in that. The
    process stays as large as it has been at its largest.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        for option, value in ((MMAP_MAX, 0), (TRIM_THRESHOLD, NEVER), (ARENA_MAX, 1)):
            mallopt(option, value)
