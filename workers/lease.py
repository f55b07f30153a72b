"""One driver per store at a time: a lease with a heartbeat."""

from __future__ import annotations

import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable
from types import TracebackType
from typing import Any, Self

import psutil

from statsvc.backends import Backend
from statsvc.canonical import canonical_json
from statsvc.errors import LeaseError
from statsvc.layout import LEASE, LEASE_SECONDS

HEARTBEAT_SECONDS = 10.0
POLL_SECONDS = 0.5


class Lease:
    """Held inside a `with` block; `check` raises LeaseError once another driver took over."""

    def __init__(self, backend: Backend) -> None:
        self._backend = backend
        self._mine: dict[str, Any] = {
            "token": uuid.uuid4().hex,
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "started": psutil.Process().create_time(),
            "since": time.time(),
        }
        self._written = b""
        self._ending = threading.Event()
        self._lost: str | None = None
        self._thread = threading.Thread(target=self._keep, daemon=True, name="lease")

    def __enter__(self) -> Self:
        """Raises LeaseError, naming the holder, where another driver holds the store."""
        current = refuse_if_held(self._backend)
        self._written = self._beat()
        if not self._backend.swap(LEASE, current, self._written):
            raise LeaseError("another driver took this store a moment ago; wait for it or stop it, then run again")
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._ending.set()
        self._thread.join()
        if self._lost is None:
            self._backend.swap(LEASE, self._written, None)

    def check(self) -> None:
        """Raises LeaseError when the lease is no longer ours: whatever is done now would be done twice."""
        if self._lost is not None:
            raise LeaseError(f"this driver lost its lease on the store ({self._lost}) and stops; run again to go on")

    def _keep(self) -> None:
        while not self._ending.wait(HEARTBEAT_SECONDS):
            beat = self._beat()
            try:
                if not self._backend.swap(LEASE, self._written, beat):
                    self._lost = "another driver took it over"
                    return
                self._written = beat
            except OSError as error:
                if time.time() - json.loads(self._written)["heartbeat"] > LEASE_SECONDS:
                    self._lost = f"its heartbeat cannot be written: {error}"
                    return

    def _beat(self) -> bytes:
        return canonical_json({**self._mine, "heartbeat": time.time()})


def refuse_if_held(backend: Backend) -> bytes | None:
    """The lease that may be replaced. Raises LeaseError, naming the holder, where a driver holds the store."""
    current = read_lease(backend)
    if current is not None and (holder := _alive(current)):
        raise LeaseError(
            f"another driver holds this store: {holder}; wait for it or stop it, then run again "
            f"(a lease without a heartbeat expires after {LEASE_SECONDS:.0f} s)"
        )
    return current


def wait_if_host_is_gone(backend: Backend, tell: Callable[[str], None]) -> None:
    """Raises LeaseError where a driver holds the store; but one on another host has to show that it still lives.

    A container that was killed and replaced leaves a lease that nobody keeps: the new one has another host name, and
    cannot look. Until that lease expires it may have to wait LEASE_SECONDS; a live driver shows within a heartbeat.
    """
    first = read_lease(backend)
    if first is None or (holder := _alive(first)) is None:
        return
    if json.loads(first)["host"] != socket.gethostname():
        tell(f"the store may be held by {holder}; waiting up to {LEASE_SECONDS:.0f} s to see whether that driver lives")
        while read_lease(backend) == first and _alive(first):
            time.sleep(POLL_SECONDS)
    refuse_if_held(backend)


def read_lease(backend: Backend) -> bytes | None:
    """The lease as it stands, or None."""
    try:
        return backend.read(LEASE)
    except FileNotFoundError:
        return None


def _alive(lease: bytes) -> str | None:
    """Who holds a lease, or None where that driver is gone."""
    try:
        held = json.loads(lease)
        host, pid, started = held["host"], held["pid"], held["started"]
        age = time.time() - held["heartbeat"]
        since = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(held["since"]))
    except (ValueError, KeyError, TypeError):
        return None  # not written by a driver
    if age > LEASE_SECONDS:
        return None
    if host == socket.gethostname() and not _runs(pid, started):
        return None
    return f"process {pid} on {host}, since {since}, last heartbeat {max(age, 0):.0f} s ago"


def _runs(pid: int, started: float) -> bool:
    """Whether that very process runs: a process id alone may have been given to another."""
    try:
        process = psutil.Process(pid)
        # A zombie was killed; where nobody looks after orphans, as in many containers, it stays in the table.
        return process.status() != psutil.STATUS_ZOMBIE and abs(process.create_time() - started) < 1
    except (psutil.NoSuchProcess, ValueError, TypeError):  # the last two: not the number of any process
        return False
