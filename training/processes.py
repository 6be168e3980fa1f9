"""Several processes that train one network, each with some of the devices.

All run the same program on the same config. Process 0 speaks and writes for all of them.
"""

from collections.abc import Callable

import jax
import numpy as np
from jax.experimental import multihost_utils

from training.config import ConfigError, TrainConfig

# A process that is not heard of for so long is lost, and the others end and say so.
HEARTBEAT_SECONDS = 30

# Of a decision that is passed on, as UTF-8.
MAX_BYTES = 4096


def initialize(config: TrainConfig) -> None:
    """Meets the other processes, if the config says that there are some.

    Without an address, JAX finds out from SLURM, Open MPI, a TPU pod or GKE where they are. To be
    called before anything else is asked of JAX.

    Raises:
      ConfigError: if it cannot find out, or the processes do not meet.
    """
    if not config.distribute:
        return
    # Programs of a CPU that run side by side would mix up what they send.
    jax.config.update("jax_cpu_enable_async_dispatch", False)
    # It would take SIGTERM, which is for training.stopping.
    jax.config.update("jax_enable_preemption_service", False)
    try:
        jax.distributed.initialize(
            config.coordinator,
            config.num_processes,
            config.process_id,
            heartbeat_timeout_seconds=HEARTBEAT_SECONDS,
        )
    except (ValueError, RuntimeError) as error:
        raise ConfigError(
            "--distribute: the processes did not meet; without SLURM, Open MPI, a TPU pod or GKE, "
            "give each of them --coordinator, --num_processes and --process_id "
            f"({str(error).splitlines()[0]})"
        ) from error


def first() -> bool:
    """Whether this process is the one that speaks and writes."""
    return jax.process_index() == 0


def agree(signum: int, save: bool, steps: int) -> tuple[int, bool, int]:
    """What all processes are to do next, who must do the same but are told and clocked apart.

    Args:
      signum: of the signal that asks this process to end, or 0.
      save: whether it is time for a checkpoint.
      steps: how many steps to dispatch at once.

    Returns:
      The same for all: the highest signal, and what process 0 has of the others.
    """
    if jax.process_count() == 1:
        return signum, save, steps
    votes = multihost_utils.process_allgather(np.array([signum, save, steps], np.int32))
    return int(votes[:, 0].max()), bool(votes[0, 1]), int(votes[0, 2])


def decide(choose: Callable[[], str]) -> str:
    """What process 0 chooses, in every process.

    Raises:
      ConfigError: in every process, if any error is raised in process 0.
    """
    if not jax.distributed.is_initialized():
        return choose()
    decision = ""
    if first():
        try:
            decision = f"+{choose()}"
        except Exception as error:
            # Else the others would wait for the decision.
            decision = f"-{error}"
    message = np.frombuffer(decision.encode().ljust(MAX_BYTES, b"\0")[:MAX_BYTES], np.uint8)
    shared = bytes(np.asarray(multihost_utils.broadcast_one_to_all(message))).rstrip(b"\0").decode()
    if shared.startswith("-"):
        raise ConfigError(shared[1:])
    return shared[1:]
