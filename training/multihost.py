"""What several processes do together.

All processes run the same program on the same config, each with some of the devices. Process 0, the
primary, speaks and writes for all of them. Whoever waits for another does so in here, or in a step.
"""

import contextlib
import functools
import itertools
import json
import logging
import os
import socket
import sys
import threading
from collections.abc import Callable
from typing import Any, NoReturn, TypeVar, cast

import jax
import numpy as np
from etils import epath
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from input_pipeline.errors import DataError
from training import workdir
from training.config import TrainConfig
from training.errors import ConfigError

log = logging.getLogger(__name__)

T = TypeVar("T")

# Processes of a job that starts may be minutes apart. Who waits longer than a moment says so.
MEETING_SECONDS = 300
PATIENCE_SECONDS = 5

# A process that is not heard of for so long is lost, and the others end and say so.
HEARTBEAT_SECONDS = 30

# The maximum size of a message to others, in bytes of UTF-8.
MAX_BYTES = 4096


def initialize(config: TrainConfig) -> None:
    """Meets the other processes, if the config says that there are some.

    Without an address, JAX finds out from SLURM, Open MPI, a TPU pod or GKE where they are. One
    process on a host drives all its GPUs, and several that SLURM or Open MPI started one each. To
    be called before anything else is asked of JAX.

    Raises:
      ConfigError: if it cannot find out, or the processes cannot meet. If others do not come, the
        process ends, with exit code 2.
    """
    if not config.distribute:
        return
    # Programs of a CPU that run side by side would mix up what they send.
    jax.config.update("jax_cpu_enable_async_dispatch", False)
    # It would take SIGTERM, which is for training.signals.
    jax.config.update("jax_enable_preemption_service", False)
    if config.coordinator and config.process_id == 0:
        try:
            # JAX would end in a segmentation fault.
            socket.create_server(("", int(config.coordinator.rpartition(":")[2]))).close()
        except OSError as error:
            reason = os.strerror(error.errno or 0)
            raise ConfigError(f"--coordinator {config.coordinator}: {reason}") from error
    failure: list[Exception] = []

    def meet() -> None:
        try:
            jax.distributed.initialize(
                config.coordinator,
                config.num_processes,
                config.process_id,
                _local_device_ids(),
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
        leave(f"--distribute: waited {MEETING_SECONDS} s in vain for {_missing(config)}")
    if failure:
        raise ConfigError(
            "--distribute: the processes did not meet; without SLURM, Open MPI, a TPU pod or GKE, "
            "give each of them --coordinator, --num_processes and --process_id "
            f"({str(failure[0]).splitlines()[0]})"
        ) from failure[0]


def _local_device_ids() -> list[int] | None:
    """Returns what JAX is to know of the GPUs of this process: [] for all, None to find one.

    It finds the one of its own number on the host for every process of SLURM and Open MPI, also for
    the only one there. And on Kubernetes it would ask the server even when it is told everything.
    """
    get = os.environ.get
    slurm = get("SLURM_STEP_NUM_TASKS") != get("SLURM_STEP_NUM_NODES")
    open_mpi = get("OMPI_COMM_WORLD_LOCAL_SIZE", "1") != "1"
    return None if slurm or open_mpi or get("JAX_LOCAL_DEVICE_IDS") else []


def introduce() -> None:
    """Says who this process is, and where, if there are several."""
    if jax.process_count() > 1:
        log.info(
            "process %s of %s: %s, pid %s, %s devices",
            jax.process_index(),
            jax.process_count(),
            socket.gethostname(),
            os.getpid(),
            jax.local_device_count(),
        )


def count_alike(*facts: object) -> int:
    """Returns how many processes, this one included, have the same facts, such as their host."""
    if jax.process_count() == 1:
        return 1
    every = _gather_text(repr(facts))
    return every.count(every[jax.process_index()])


def leave(message: str) -> NoReturn:
    """Ends this process, with exit code 2, where others may wait for it.

    An exception would let JAX wait for them in turn, and say at length what the message says.
    """
    print(f"error: {message}", file=sys.stderr, flush=True)
    os._exit(2)


def _missing(config: TrainConfig) -> str:
    """Names whom this process waits for, as far as it can tell."""
    if config.coordinator is None or config.process_id == 0:
        return "the other processes"
    host, _, port = config.coordinator.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=1).close()
    except OSError as error:
        return f"process 0 at {config.coordinator} ({error.strerror or error})"
    return "the other processes"


def is_primary() -> bool:
    """Returns whether this process is the one that speaks and writes."""
    return jax.process_index() == 0


def agree(signum: int, save: bool, steps: int) -> tuple[int, bool, int]:
    """Returns what all processes do next. They are told and clocked apart, and must do the same.

    Args:
      signum: the number of the signal that asks this process to end, or 0.
      save: whether it is time for a checkpoint.
      steps: how many steps to dispatch at once.

    Returns:
      The same for all: the highest signal, and what process 0 has of the others.
    """
    if jax.process_count() == 1:
        return signum, save, steps
    return _count(_vote(signum, save, steps))


class LateAgreement:
    """Does what :func:`agree` does, with what each process said in the call before.

    So no process waits: the devices have gathered what was said then while they took the steps that
    were dispatched since.
    """

    def __init__(self) -> None:
        self._votes: jax.Array | None = None

    def agree(self, signum: int, save: bool, steps: int) -> tuple[int, bool, int]:
        """Returns what all processes do next; at the first call, to go on by one step."""
        if jax.process_count() == 1:
            return signum, save, steps
        before, self._votes = self._votes, _vote(signum, save, steps)
        return (0, False, 1) if before is None else _count(before)


@functools.cache
def _gathering() -> tuple[NamedSharding, Callable[[jax.Array], jax.Array]]:
    """Returns how facts are split, a row to each device, and a program that gathers them.

    All devices take part, as in a step: XLA orders programs of several devices of a process, but on
    a CPU it ran one of a single device beside a step, and Gloo mixed up what they sent.
    """
    mesh = Mesh(sorted(jax.devices(), key=lambda device: device.process_index), "device")
    everywhere = NamedSharding(mesh, PartitionSpec())
    gather = jax.jit(lambda rows: rows, out_shardings=everywhere)
    return NamedSharding(mesh, PartitionSpec("device")), gather


def _gather(fact: np.ndarray) -> jax.Array:
    """Starts to gather an array of each process, once for each device, process 0's first."""
    by_device, gather = _gathering()
    rows = np.stack([fact] * jax.local_device_count())
    return gather(jax.make_array_from_process_local_data(by_device, rows))


def _vote(signum: int, save: bool, steps: int) -> jax.Array:
    log.debug("votes for signal %s, saving %s, %s steps", signum, save, steps)
    return _gather(np.array([signum, save, steps], np.int32))


def _count(gathered: jax.Array) -> tuple[int, bool, int]:
    votes = np.asarray(gathered.addressable_data(0))
    agreed = int(votes[:, 0].max()), bool(votes[0, 1]), int(votes[0, 2])
    log.debug("agreed on signal %s, saving %s, %s steps", *agreed)
    return agreed


def check_same(collect: Callable[[], dict[str, Any]]) -> None:
    """Raises ConfigError in every process if a process has another value of a fact than process 0.

    Args:
      collect: returns JSON values by name, under the same names in every process. It is not called
        if there is one process.
    """
    if jax.process_count() == 1:
        return
    every = [json.loads(text) for text in _gather_text(json.dumps(collect()))]
    for name, number in itertools.product(every[0], range(len(every))):
        if every[number][name] != every[0][name]:
            raise ConfigError(
                f"{name}: {every[number][name]} in process {number} and {every[0][name]} in "
                "process 0; all need the same"
            )


def check_shared(folder: epath.Path) -> None:
    """Raises ConfigError in every process if one of them does not see process 0's folder."""
    if jax.process_count() == 1:
        return
    with contextlib.ExitStack() as stack:
        leave = lambda: stack.enter_context(workdir.token(folder))
        name = broadcast_from_primary(leave)
        in_every(lambda: workdir.find_token(folder, name))


def in_every(call: Callable[[], T]) -> T:
    """Calls a function in every process, and returns what it returns; if one fails, all do.

    Raises:
      ConfigError: if the function raises it or a DataError in another process. What it raises in
        this process is raised as it is.
    """
    if jax.process_count() == 1:
        return call()
    result, failure = None, None
    try:
        result = call()
    except (ConfigError, DataError) as error:
        failure = error
    every = _gather_text(str(failure or ""))
    if failure:
        raise failure
    for number, text in enumerate(every):
        if text:
            raise ConfigError(f"process {number}: {text}")
    return cast(T, result)


def _gather_text(text: str) -> list[str]:
    """Returns the text of every process, cut to the size of a message."""
    log.debug("waiting for what the others have to say, and saying %r", text)
    encoded = np.frombuffer(text.encode()[:MAX_BYTES].ljust(MAX_BYTES, b"\0"), np.uint8)
    # On all devices: a process that ends while others still connect leaves them waiting.
    gathered = jax.block_until_ready(_gather(encoded))
    owners = [device.process_index for device in _gathering()[0].mesh.devices.flat]
    rows = dict(zip(owners, np.asarray(gathered.addressable_data(0)), strict=True))
    return [bytes(row).rstrip(b"\0").decode(errors="ignore") for row in rows.values()]


def broadcast_from_primary(choose: Callable[[], str]) -> str:
    """Calls a function in process 0 alone, and returns in every process what it returns there.

    Raises:
      ConfigError: in the other processes, if process 0 raises one or a DataError.
      RuntimeError: in the other processes, if process 0 raises any other error. Process 0 raises
        the error itself.
    """
    if not jax.distributed.is_initialized():
        return choose()
    message, failure = "", None
    if is_primary():
        try:
            message = f"+{choose()}"
        except Exception as error:  # Else the others would wait for the message.
            failure = error
            message = f"{'-' if isinstance(error, ConfigError | DataError) else '!'}{error}"
    log.debug("waiting for what process 0 has to say")
    shared, *_ = _gather_text(message)
    log.debug("process 0 says %r", shared)
    if failure:
        raise failure
    if shared.startswith("-"):
        raise ConfigError(shared[1:])
    if shared.startswith("!"):
        raise RuntimeError(f"process 0 failed: {shared[1:]}")
    return shared[1:]
