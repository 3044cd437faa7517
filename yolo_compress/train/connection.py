"""A TCP connection from each rank to rank 0. It carries trainings and results, and ends if a process, machine or network does.

The kernel probes an idle connection every few seconds. So a lost machine is noticed within `LOSS_S`, and a rank that computes for
hours is never taken for a lost one.
"""

from __future__ import annotations

import json
import os
import secrets
import select
import socket
import struct
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta

from torch.distributed import DistError, DistStoreError, PrefixStore, Store, rendezvous

from yolo_compress import ranks
from yolo_compress.errors import EnvironmentLacks, LostRank, RecipeError

JOIN_S = 300  # time for all ranks to start and to connect
PROBE_S = 5  # time between two probes of an idle connection
LOSS_S = 30  # a connection whose other end answers no probe for this time is lost
LOST = (
    "the connection to another rank is lost: its process, machine or network stopped; the same command continues where it "
    "stopped"
)
HELLO = struct.Struct("!32sI")  # token of rank 0, rank
LENGTH = struct.Struct("!Q")


def connect(agreed: Mapping[str, str], number: int) -> tuple[Store, list[socket.socket]]:
    """Meet the other ranks, compare `agreed` with them, and open the connections.

    Args:
        agreed: Values that must be equal on all ranks, by name.
        number: Number of the connection among those of this process. It is equal on all ranks.

    Returns:
        A store of torch that all ranks share; and the connections: on rank 0 those to the other ranks in their order, on another
        rank the one to rank 0.

    Raises:
        RecipeError: On rank 0, if ranks differ in `agreed`.
        LostRank: On the other ranks, if ranks differ in `agreed`.
        EnvironmentLacks: Not all ranks met within `JOIN_S`.
    """
    try:
        found, _, _ = next(rendezvous("env://", timeout=timedelta(seconds=JOIN_S)))
        store = PrefixStore(f"group {number}", found)
        store.set(f"agreed/{ranks.rank()}", json.dumps(dict(agreed)))
        try:
            connections = _accept(store) if ranks.rank() == 0 else [_reach(store)]
        except Exception:
            if ranks.rank() == 0:
                store.set("address", "")  # the others need not wait
            raise
    except (DistError, OSError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise EnvironmentLacks(
            f"the {ranks.world()} ranks did not meet ({reason}): start all of them within {JOIN_S // 60} minutes, on machines that "
            f"reach {os.environ['MASTER_ADDR']} (MASTER_ADDR)"
        ) from error
    for connection in connections:
        _probe(connection)
    return store, connections


def _accept(store: Store) -> list[socket.socket]:
    """On rank 0, compare what the ranks have to agree on, and accept a connection from each."""
    keys = [f"agreed/{number}" for number in range(ranks.world())]
    try:
        store.wait(keys)
    except DistStoreError as error:
        absent = ", ".join(str(number) for number, key in enumerate(keys) if not store.check([key]))
        raise EnvironmentLacks(
            f"rank {absent} did not start within {JOIN_S // 60} minutes: look at the output of its machine"
        ) from error
    every = [json.loads(store.get(key)) for key in keys]
    for number, other in enumerate(every):
        if different := [name for name in every[0] if other.get(name) != every[0][name]]:
            raise RecipeError(
                f"rank {number} was started with another {' and another '.join(different)} than rank 0: give every machine the "
                "same command, recipe, versions and kind of device"
            )
    token = secrets.token_hex(16)
    found: dict[int, socket.socket] = {}
    with socket.create_server((_host() if _one_machine() else "", 0)) as server:
        store.set("address", json.dumps([server.getsockname()[1], token]))
        server.settimeout(JOIN_S)
        while len(found) < ranks.world() - 1:
            connection, _ = server.accept()
            connection.settimeout(JOIN_S)
            hello = connection.recv(HELLO.size, socket.MSG_WAITALL)
            if len(hello) == HELLO.size and secrets.compare_digest(hello[:32], token.encode()):
                found[HELLO.unpack(hello)[1]] = connection
            else:  # a stranger
                connection.close()
    return [found[number] for number in sorted(found)]


def _reach(store: Store) -> socket.socket:
    """On another rank, connect to rank 0."""
    address = store.get("address")
    if not address:
        raise LostRank("rank 0 ended before the training")
    port, token = json.loads(address)
    connection = socket.create_connection((_host(), port), timeout=JOIN_S)
    connection.sendall(HELLO.pack(token.encode(), ranks.rank()))
    return connection


def _one_machine() -> bool:
    return ranks.local_world() == ranks.world()


def _host() -> str:
    """Return the host of rank 0, from the view of this rank."""
    return "127.0.0.1" if _one_machine() else os.environ["MASTER_ADDR"]


def _probe(connection: socket.socket) -> None:
    """Let the kernel end the connection if the other end does not answer for `LOSS_S`."""
    connection.settimeout(None)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, PROBE_S)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, PROBE_S)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, LOSS_S * 1000)


def send(connection: socket.socket, content: bytes | memoryview) -> None:
    """Send `content` as soon as the other end calls `receive`. Until then the connection is idle, so the kernel probes it.

    Raises:
        LostRank: The connection ended.
    """
    with _ended():
        _exactly(connection, 1)
        connection.sendall(LENGTH.pack(len(content)))
        connection.sendall(content)


def receive(connection: socket.socket) -> bytearray:
    """Wait for the other end to call `send`, for as long as it takes. Return the content.

    Raises:
        LostRank: The connection ended.
    """
    with _ended():
        connection.sendall(b"r")
        return _exactly(connection, LENGTH.unpack(_exactly(connection, LENGTH.size))[0])


def _exactly(connection: socket.socket, size: int) -> bytearray:
    content = bytearray(size)
    view = memoryview(content)
    while view:
        count = connection.recv_into(view)
        if not count:
            raise LostRank(LOST)
        view = view[count:]
    return content


@contextmanager
def _ended() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise LostRank(LOST) from error


def await_end(connections: Sequence[socket.socket], seconds: float) -> None:
    """Wait until the other ends are closed, for at most `seconds` each."""
    for connection in connections:
        connection.settimeout(seconds)
        try:
            while connection.recv(1):
                pass
        except OSError:  # also a timeout
            continue


@contextmanager
def watched(connections: Sequence[socket.socket], lost: Callable[[], None]) -> Iterator[Callable[[], None]]:
    """Call `lost` in another thread as soon as a connection ends during the block. Nothing is read from the connections.

    Yields:
        A function that stops watching.
    """
    stopped = os.eventfd(0)
    poll = select.poll()
    poll.register(stopped, select.POLLIN)
    for connection in connections:
        poll.register(connection, select.POLLRDHUP)

    def wait() -> None:
        if stopped not in {number for number, _ in poll.poll()}:
            lost()

    thread = threading.Thread(target=wait, name="other ranks", daemon=True)
    thread.start()
    try:
        yield lambda: os.eventfd_write(stopped, 1)
    finally:
        os.eventfd_write(stopped, 1)
        thread.join()
        os.close(stopped)
