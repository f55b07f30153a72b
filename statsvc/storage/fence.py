"""A storage that is written only while a lease is held: whoever lost it writes nothing more."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from typing import BinaryIO

from statsvc.digests import canonical_json
from statsvc.errors import LeaseError, StoreError
from statsvc.storage.backend import Backend, Upload
from statsvc.storage.forwarding import ForwardingBackend

LEASE = ".statsvc/lease.json"
# The lease once its driver has ended. It is never removed: object storage has no conditional DELETE, a plain one could
# hit what another driver put there a moment ago. The same bytes for everyone, so that stores can be compared.
RELEASED = canonical_json({"released": True})
SHARE = 0.05  # of the time may go into reading the lease, where that takes long
TRUSTED_SECONDS = 1.0  # at most, from the moment a read began
LOOK_SECONDS = 5.0  # an answer slower than this is too old to rely on
LOOKS = 5  # of which one must be quicker than that


def boot_time() -> float:
    """Seconds that no clock setting changes, and that go on while the machine sleeps."""
    return time.clock_gettime(time.CLOCK_BOOTTIME) if hasattr(time, "CLOCK_BOOTTIME") else time.monotonic()


class Fence:
    """Raises LeaseError unless the lease of a store is the one with this token.

    It reads the lease itself and trusts no clock: a process that was stopped for hours does not know that it was. Where
    a read takes 20 ms, as on object storage, its answer is trusted for 0.4 s.
    """

    def __init__(self, backend: Backend, token: str, clock: Callable[[], float] = boot_time) -> None:
        self._backend, self._token, self._clock = backend, token, clock
        self._trusted_until = 0.0

    def check(self) -> None:
        """Raises LeaseError, and StoreError if the lease cannot be read in time."""
        if self._clock() < self._trusted_until:
            return
        for _ in range(LOOKS):
            begun = self._clock()
            self._look()
            took = self._clock() - begun
            if took <= LOOK_SECONDS:
                self._trusted_until = begun + min(took / SHARE, TRUSTED_SECONDS)
                return
        raise StoreError(
            f"the lease of the store could not be read within {LOOK_SECONDS:.0f} s, {LOOKS} times in a row; nothing is "
            "written without it: run again once the storage answers"
        )

    def _look(self) -> None:
        try:
            lease = self._backend.read(LEASE)
            holder = json.loads(lease).get("token")
        except FileNotFoundError as error:
            raise LeaseError(
                "the lease of this driver is gone: was the store removed or renamed? Nothing more is written; run "
                "again to go on"
            ) from error
        except (ValueError, AttributeError) as error:
            raise LeaseError("the lease of this store was overwritten by something else; run again to go on") from error
        if lease == RELEASED:
            raise LeaseError("the driver that this work is for has ended; nothing more is written, run again to go on")
        if holder != self._token:
            raise LeaseError("another driver took this store over; nothing more is written here, run again to go on")


class FencedBackend(ForwardingBackend):
    """Reads what the backend has; before it writes, the fence is asked."""

    def __init__(self, backend: Backend, fence: Fence) -> None:
        super().__init__(backend)
        self._fence = fence

    def write(self, path: str, data: bytes) -> None:
        self._fence.check()
        self._backend.write(path, data)

    def create(self, path: str) -> Upload:
        self._fence.check()
        return _FencedUpload(self._backend.create(path), self._fence)

    def remove(self, path: str) -> None:
        self._fence.check()
        self._backend.remove(path)

    def swap(self, path: str, expected: bytes | None, data: bytes) -> bool:
        self._fence.check()
        return self._backend.swap(path, expected, data)

    def sweep(self) -> int:
        self._fence.check()
        return self._backend.sweep()


class _FencedUpload:
    """Begun under the lease, and published only under it."""

    def __init__(self, upload: Upload, fence: Fence) -> None:
        self._upload, self._fence = upload, fence

    @property
    def file(self) -> BinaryIO:
        return self._upload.file

    def publish(self) -> None:
        self._fence.check()
        self._upload.publish()

    def discard(self) -> None:
        self._upload.discard()
