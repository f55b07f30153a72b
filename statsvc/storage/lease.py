"""One driver per store at a time: a lease with a heartbeat.

Wall clocks are shown, and hint at what is worth waiting for; none is trusted. A driver on another machine is gone once
its lease has not changed for some time by our own clock, which nobody can set. A driver that ends leaves RELEASED.
"""

from __future__ import annotations

import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self

from statsvc.digests import canonical_json
from statsvc.errors import LeaseError
from statsvc.storage.backend import Backend
from statsvc.storage.fence import LEASE, RELEASED, Fence, boot_time


@dataclass(frozen=True)
class Timing:
    """Seconds.

    expires    after which a lease without a heartbeat is another's to take: six of them are missing then. Clocks of
               machines that share a store may differ by less
    heartbeat  between two heartbeats
    watch      in which a driver that lives shows a heartbeat, also if one of them is late
    poll       between two looks at the lease of another driver
    """

    expires: float = 60.0
    heartbeat: float = 10.0
    watch: float = 25.0
    poll: float = 0.5


TIMING = Timing()


class Lease:
    """Held inside a `with` block.

    token  tells workers whose units they do
    fence  raises LeaseError once another driver took over
    """

    def __init__(self, backend: Backend, timing: Timing | None = None) -> None:
        self._backend, self._timing = backend, timing or TIMING
        self.token = uuid.uuid4().hex
        self.fence = Fence(backend, self.token)
        self._mine: dict[str, Any] = {
            "token": self.token,
            "host": socket.gethostname(),
            "machine": this_machine(),
            "pid": os.getpid(),
            "started": start_of(os.getpid()),
            "since": time.time(),
        }
        self._written, self._beaten = b"", 0.0
        self._ending = threading.Event()
        self._lost: str | None = None
        self._expired: bytes | None = None  # a lease that was watched, and that nobody keeps
        self._thread = threading.Thread(target=self._keep, daemon=True, name="lease")

    def wait_for_others(self, report: Callable[[str], None]) -> None:
        """Raises LeaseError if a driver holds the store; one on another machine must renew its heartbeat while we wait.

        A container that was killed and replaced leaves a lease that nobody keeps: the new container has another name
        and cannot see its processes. A live driver shows within a heartbeat or two.
        """
        first = read_lease(self._backend)
        holder = self._holder(first)
        if holder is None:
            return
        if holder.is_near and holder.is_fresh:
            raise self._refusal(holder)
        seconds = self._timing.watch
        if holder.is_fresh:
            seconds = max(self._timing.expires - holder.age, seconds)
        report(
            f"the store may be held by {holder.text}; waiting up to {seconds:.0f} s to see whether that driver lives"
        )
        self._watch(first, seconds)

    def __enter__(self) -> Self:
        """Raises LeaseError, naming the holder, where another driver holds the store."""
        current = read_lease(self._backend)
        if current != self._expired and (holder := self._holder(current)) is not None:
            if holder.is_fresh:
                raise self._refusal(holder)
            self._watch(current, self._timing.watch)
        beat, begun = self._beat(), boot_time()
        # An answer that was lost on the way back leaves our own beat there.
        if not self._backend.swap(LEASE, current, beat) and read_lease(self._backend) != beat:
            raise LeaseError("another driver took this store a moment ago; wait for it or stop it, then run again")
        self._written, self._beaten = beat, begun
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._ending.set()
        self._thread.join()
        if self._lost is None and not self._backend.swap(LEASE, self._written, RELEASED):
            there = read_lease(self._backend)
            if there is not None and self._is_mine(there):
                self._backend.swap(LEASE, there, RELEASED)

    def check(self) -> None:
        """Raises LeaseError when the lease is no longer ours: whatever is done now would be done twice."""
        if self._lost is not None:
            raise LeaseError(f"this driver lost its lease on the store ({self._lost}) and stops; run again to go on")
        self.fence.check()

    def _watch(self, lease: bytes | None, seconds: float) -> None:
        """Raises LeaseError if the lease gets a heartbeat or another holder within that time."""
        end = boot_time() + seconds
        while boot_time() < end and self._holder(lease) is not None:
            time.sleep(min(self._timing.poll, seconds))
            if (now := read_lease(self._backend)) != lease:
                if (holder := self._holder(now)) is not None:
                    raise self._refusal(holder)
                return
        self._expired = lease

    def _keep(self) -> None:
        while not self._ending.wait(self._timing.heartbeat):
            beat, begun = self._beat(), boot_time()
            try:
                if not self._backend.swap(LEASE, self._written, beat) and (there := read_lease(self._backend)) != beat:
                    # A heartbeat whose response timed out may have been stored all the same.
                    if there is not None and self._is_mine(there):
                        self._written = there
                        continue
                    self._lost = "the store is gone" if there is None else "another driver took it over"
                    return
                self._written, self._beaten = beat, begun
            except Exception as error:
                if boot_time() - self._beaten > self._timing.expires:
                    self._lost = f"its heartbeat cannot be written: {error}"
                    return

    def _is_mine(self, lease: bytes) -> bool:
        return f'"token":"{self.token}"'.encode() in lease

    def _beat(self) -> bytes:
        return canonical_json({**self._mine, "heartbeat": time.time()})

    def _holder(self, lease: bytes | None) -> _Holder | None:
        return _holder(lease, self._timing.expires)

    def _refusal(self, holder: _Holder) -> LeaseError:
        return LeaseError(
            f"another driver holds this store: {holder.text}; wait for it or stop it, then run again "
            f"(a lease without a heartbeat expires after {self._timing.expires:.0f} s)"
        )


class _Holder(NamedTuple):
    """A driver that may hold a store.

    age       seconds since its heartbeat, as far as the clocks agree
    is_near   it is a process of this machine, and runs
    is_fresh  by the clocks, its last heartbeat is not older than a lease lasts
    """

    text: str
    age: float
    is_near: bool
    is_fresh: bool


def _holder(lease: bytes | None, expires: float) -> _Holder | None:
    """Who may hold a lease; None for none, for a released one, and if that driver is known to be gone."""
    try:
        held = json.loads(lease or b"")
        pid, started, age = held["pid"], held["started"], time.time() - held["heartbeat"]
        is_near = held.get("machine") == this_machine() != ""
        since = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(held["since"]))
        text = f"process {pid} on {held['host']}, since {since}, last heartbeat {max(age, 0):.0f} s ago"
    except (ValueError, KeyError, TypeError, OverflowError, OSError):
        return None  # released, or not written by a driver
    if is_near and started != start_of(pid):
        return None
    return _Holder(text, max(age, 0.0), is_near, -expires <= age <= expires)


def read_lease(backend: Backend) -> bytes | None:
    """The lease as it stands, or None."""
    try:
        return backend.read(LEASE)
    except FileNotFoundError:
        return None


def this_machine() -> str:
    """Where process ids mean the same: containers on one host may share its name, and not its processes."""
    try:
        return f"{Path('/proc/sys/kernel/random/boot_id').read_text().strip()} {os.readlink('/proc/self/ns/pid')}"  # noqa: PTH115
    except OSError:  # not Linux
        return ""


def start_of(pid: int) -> int | None:
    """When that process began, in ticks since the machine did; None where none runs. An id may be given to another.

    A zombie was killed; where nobody looks after orphans, as in many containers, it stays in the table.
    """
    try:
        fields = Path(f"/proc/{pid:d}/stat").read_text().rpartition(")")[2].split()
    except (OSError, ValueError, TypeError):  # the last two: not the number of any process
        return None
    return None if fields[0] == "Z" else int(fields[19])


def driven_since(storage: Backend) -> float | None:
    """Seconds since the last heartbeat of the driver that seems to work on the store; None if there is none."""
    try:
        age = time.time() - json.loads(storage.read(LEASE))["heartbeat"]
    except (FileNotFoundError, ValueError, LookupError, TypeError, RecursionError, OverflowError):
        return None
    # One from the future was written before a clock was set.
    return max(age, 0.0) if -TIMING.expires <= age <= TIMING.expires else None
