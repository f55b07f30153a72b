"""A storage that is written only while a lease is held: whoever lost it writes nothing more."""

from __future__ import annotations

import json
import time
from typing import BinaryIO

from statsvc.errors import LeaseError, StoreError
from statsvc.storage.backend import Backend, Upload
from statsvc.storage.forwarding import ForwardingBackend

LEASE = ".statsvc/lease.json"
LEASE_SECONDS = 60.0  # without a heartbeat, six of them; clocks of hosts that share a store may differ by less
SHARE = 0.05  # of the time may go into looking at the lease, where that takes long
BELIEVED_SECONDS = 1.0  # at most, from the beginning of the look on
LOOK_SECONDS = 5.0  # an answer that took longer, or that we slept over, tells nothing of now
LOOKS = 5  # of which one must be quicker than that


class Fence:
    """Raises LeaseError unless the lease of a store is the one with this token.

    It looks at the lease itself, not at a clock: a process that was stopped for hours does not know that it was. Where
    a look takes 20 ms, as on object storage, it is believed for 0.4 s.
    """

    def __init__(self, backend: Backend, token: str) -> None:
        self._backend, self._token = backend, token
        self._believed_until = 0.0

    def check(self) -> None:
        if boot_time() < self._believed_until:
            return
        for _ in range(LOOKS):
            begun = boot_time()
            self._look()
            took = boot_time() - begun
            if took <= LOOK_SECONDS:
                self._believed_until = begun + min(took / SHARE, BELIEVED_SECONDS)
                return
        raise StoreError(
            f"the lease of the store could not be read within {LOOK_SECONDS:.0f} s, {LOOKS} times in a row; nothing is "
            "written without it: run again once the storage answers"
        )

    def _look(self) -> None:
        try:
            holder = json.loads(self._backend.read(LEASE)).get("token")
        except FileNotFoundError as error:
            raise LeaseError(
                "the lease of this driver is gone: was the store removed or renamed? Nothing more is written; run "
                "again to go on"
            ) from error
        except (ValueError, AttributeError) as error:
            raise LeaseError("the lease of this store was overwritten by something else; run again to go on") from error
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

    def swap(self, path: str, expected: bytes | None, data: bytes | None) -> bool:
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


def boot_time() -> float:
    """Seconds that no clock setting changes, and that go on while the machine sleeps."""
    return time.clock_gettime(time.CLOCK_BOOTTIME) if hasattr(time, "CLOCK_BOOTTIME") else time.monotonic()
