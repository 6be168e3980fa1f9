"""How many cores a process may use, and so how many workers it has by default."""

import math
import os
import re
from pathlib import Path

# More workers would fill the memory of a large host with batches, for no gain.
MAX_WORKERS = 32


def default_workers(processes: int = 1) -> int:
    """Returns one worker per core that this process may use, less one to feed the devices.

    Args:
      processes: how many processes of the run share these cores.
    """
    return min(MAX_WORKERS, max(1, cores() // processes - 1))


def cores() -> int:
    """Returns how many cores this process may use, by its affinity and the quota of its cgroup."""
    return max(1, math.floor(min(len(affinity()), quota())))


def affinity() -> list[int]:
    """Returns the numbers of the cores that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))


def quota(
    membership: Path = Path("/proc/self/cgroup"), root: Path = Path("/sys/fs/cgroup")
) -> float:
    """Returns how many cores' time the cgroup of this process, and those around it, allow.

    As the kernel's documentation of cgroup v2 describes ``cpu.max``; infinite without a limit.

    Args:
      membership: the file that names the cgroup.
      root: the folder of all cgroups.
    """
    found = re.search("^0::/(.*)$", membership.read_text(), re.M) if membership.exists() else None
    cgroup = Path(found[1] if found else ".")
    allowed = math.inf
    for file in (root / folder / "cpu.max" for folder in (cgroup, *cgroup.parents)):
        if file.exists():
            limit, period = file.read_text().split()
            allowed = min(allowed, math.inf if limit == "max" else int(limit) / int(period))
    return allowed
