"""Several processes that train one network, each with some of the devices.

All run the same program on the same config. Process 0 speaks and writes for all of them.
"""

import logging
import os
import socket
import sys
import threading
from collections.abc import Callable

import jax
import numpy as np
from jax.experimental import multihost_utils

from training.config import ConfigError, TrainConfig

log = logging.getLogger(__name__)

# Processes of a job that starts may be minutes apart. Who waits longer than a moment says so.
MEETING_SECONDS = 300
PATIENCE_SECONDS = 5

# A process that is not heard of for so long is lost, and the others end and say so.
HEARTBEAT_SECONDS = 30

# Of a decision that is passed on, as UTF-8.
MAX_BYTES = 4096


def initialize(config: TrainConfig) -> None:
    """Meets the other processes, if the config says that there are some.

    Without an address, JAX finds out from SLURM, Open MPI, a TPU pod or GKE where they are. To be
    called before anything else is asked of JAX.

    Raises:
      ConfigError: if it cannot find out, or the processes cannot meet. If others do not come, the
        process ends, with exit code 2.
    """
    if not config.distribute:
        return
    # Programs of a CPU that run side by side would mix up what they send.
    jax.config.update("jax_cpu_enable_async_dispatch", False)
    # It would take SIGTERM, which is for training.stopping.
    jax.config.update("jax_enable_preemption_service", False)
    failure: list[Exception] = []

    def meet() -> None:
        try:
            jax.distributed.initialize(
                config.coordinator,
                config.num_processes,
                config.process_id,
                # Time for us to say in one line what JAX says by aborting.
                initialization_timeout=2 * MEETING_SECONDS,
                heartbeat_timeout_seconds=HEARTBEAT_SECONDS,
            )
        except Exception as error:
            failure.append(error)

    # In a thread, since Python answers no signals while its main thread waits inside JAX.
    thread = threading.Thread(target=meet, daemon=True)
    thread.start()
    thread.join(PATIENCE_SECONDS)
    if thread.is_alive():
        log.warning("waiting for %s", _missing(config))
        thread.join(MEETING_SECONDS - PATIENCE_SECONDS)
    if thread.is_alive():
        # Not an exception, on the way of which JAX says the same at length, some seconds later.
        print(
            f"error: --distribute: waited {MEETING_SECONDS} s in vain for {_missing(config)}",
            file=sys.stderr,
            flush=True,
        )
        os._exit(2)
    if failure:
        raise ConfigError(
            "--distribute: the processes did not meet; without SLURM, Open MPI, a TPU pod or GKE, "
            "give each of them --coordinator, --num_processes and --process_id "
            f"({str(failure[0]).splitlines()[0]})"
        ) from failure[0]


def _missing(config: TrainConfig) -> str:
    """Whom this process waits for, as far as it can tell."""
    if config.coordinator is None or config.process_id == 0:
        return "the other processes"
    host, _, port = config.coordinator.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=1).close()
    except OSError as error:
        return f"process 0 at {config.coordinator} ({error.strerror or error})"
    return "the other processes"


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
