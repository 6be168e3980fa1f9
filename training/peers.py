"""Who is lost: when one process of several dies, the others say which, and end at once.

JAX's own service finds it out too, by heartbeats that stop; that takes half a minute, and on a CPU
Gloo may abort before, without saying whom it misses. Here every process holds a connection to the
first one, which the system closes when either of them dies, however it does. What closes no
connection, as a host that loses its power, is left to the heartbeats.
"""

import contextlib
import ctypes
import os
import secrets
import selectors
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator

import jax

from training import processes
from training.config import TrainConfig

# What a process sends before it ends in good order.
GOODBYE = b"!"
CONNECT_SECONDS = 10
# What a process says when it connects follows at once.
GREETING_SECONDS = 1


@contextlib.contextmanager
def watched(config: TrainConfig, together: tuple[type[Exception], ...]) -> Iterator[None]:
    """While it is open, this process ends with exit code 1 as soon as another is lost.

    Where the processes cannot connect, as through a firewall, it is left to JAX's heartbeats.

    Args:
      config: of the run.
      together: exceptions that, if one process raises them, all do.
    """
    if jax.process_count() == 1:
        yield
        return
    connections = _meet(config)
    try:
        with _slow_to_abort():
            yield
    except together:
        _part(connections)
        raise
    _part(connections)


@contextlib.contextmanager
def _slow_to_abort() -> Iterator[None]:
    """Lets an abort wait for a few seconds, in which it can be said who is lost.

    Gloo aborts the process from a thread of its own, which has nothing to do with Python. So what
    answers the signal is the C library's sleep, which takes the signal's number for seconds.
    """
    libc = ctypes.CDLL(None)
    libc.signal.argtypes, libc.signal.restype = (ctypes.c_int, ctypes.c_void_p), ctypes.c_void_p
    before = libc.signal(signal.SIGABRT, ctypes.cast(libc.sleep, ctypes.c_void_p))
    try:
        yield
    finally:
        libc.signal(signal.SIGABRT, before)


def _meet(config: TrainConfig) -> list[socket.socket]:
    """Connects with the first process, or in the first, lets the others connect.

    Returns:
      The connections; in the first process, they come in while it goes on.
    """
    first, connections = processes.first(), []
    if first:
        listener = socket.create_server(("", 0))
    host = config.coordinator.rpartition(":")[0] if config.coordinator else socket.gethostname()
    # Nobody else is to be able to say that a process is lost.
    invite = lambda: f"{host} {listener.getsockname()[1]} {secrets.token_hex(16)}"
    host, port, token = processes.decide(invite).split()
    if first:
        _in_background(_watch_all, listener, token.encode(), connections)
        return connections
    with contextlib.suppress(OSError):
        connection = socket.create_connection((host, int(port)), CONNECT_SECONDS)
        connection.sendall(f"{token}{jax.process_index():06d}".encode())
        connection.settimeout(None)
        connections.append(connection)
        _in_background(_watch_first, connection)
    return connections


def _in_background(watch: Callable[..., None], *arguments: object) -> None:
    threading.Thread(target=watch, args=arguments, daemon=True).start()


def _part(connections: list[socket.socket]) -> None:
    for connection in connections:
        with contextlib.suppress(OSError):
            connection.sendall(GOODBYE)


def _watch_first(connection: socket.socket) -> None:
    """In every other process: waits for what the first says, or for its end."""
    heard = _receive(connection, 6)
    if heard[:1] != GOODBYE:
        _end(int(heard or 0))


def _watch_all(listener: socket.socket, token: bytes, connections: list[socket.socket]) -> None:
    """In the first process: waits for the end of any other, and tells the rest."""
    selector = selectors.DefaultSelector()
    selector.register(listener, selectors.EVENT_READ)
    while True:
        for key, _ in selector.select():
            if key.fileobj is listener:
                connection, _ = listener.accept()
                connection.settimeout(GREETING_SECONDS)
                greeting = _receive(connection, len(token) + 6)
                if len(greeting) == len(token) + 6 and secrets.compare_digest(
                    greeting[: len(token)], token
                ):
                    connections.append(connection)
                    selector.register(connection, selectors.EVENT_READ, greeting[len(token) :])
                else:
                    connection.close()
            elif _receive(key.fileobj, 1) == GOODBYE:
                selector.unregister(key.fileobj)
            else:
                for connection in connections:
                    with contextlib.suppress(OSError):
                        connection.sendall(key.data)
                _end(int(key.data))


def _receive(connection: socket.socket, size: int) -> bytes:
    """So many bytes, or fewer if the connection ends before."""
    received = b""
    with contextlib.suppress(OSError):
        while len(received) < size and (more := connection.recv(size - len(received))):
            received += more
            if received == GOODBYE:
                break
    return received


def _end(process: int) -> None:
    print(
        f"error: process {process} of {jax.process_count()} is lost; start all of them again, and "
        "they go on from the last checkpoint",
        file=sys.stderr,
        flush=True,
    )
    os._exit(1)
