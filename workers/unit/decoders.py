"""Decoder processes: images go in, arrays come out in the same order, with a bounded number in flight.

One thread and one pipe per process. A ProcessPoolExecutor would need less code, but its processes share one result
pipe: measured, a decoder killed while it writes there leaves the parent waiting for ever. Here its own pipe breaks.

The arrays travel pickled. Measured on photographs of 108 kB, all transport takes 0.3 of 3.2 ms per image at size 224
and 2.3 of 10.5 ms at size 1024: one more decoder is simpler than shared memory, of which Docker grants 64 MB.
"""

import os
import signal
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from itertools import islice
from multiprocessing.connection import Connection, Pipe
from multiprocessing.context import SpawnProcess
from queue import SimpleQueue
from types import TracebackType
from typing import Any, Self, TypeVar

from statsvc.dataset.decode import Decoded, Resize, decode_views
from statsvc.errors import EngineError, PlanError
from statsvc.numerics.views import CENTER

T = TypeVar("T")
Views = tuple[Decoded, ...] | str  # of one image, or why there are none
# What libraries read when they load, so it has to be there before a decoder process begins.
ENVIRONMENT = {
    # A pool of BLAS threads as wide as the machine in every decoder would exhaust it.
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    # glibc gives the memory of each image back to the kernel and then takes it again page by page. Keeping up to
    # 64 MiB turned 15 ms per image at size 1024 into 10; one of the two values alone changes little.
    "MALLOC_MMAP_THRESHOLD_": str(32 << 20),
    "MALLOC_TRIM_THRESHOLD_": str(64 << 20),
}


class Decoders:
    """A pool of decoder processes that lives as long as the `with` block.

    with Decoders(4) as decoders:
        for sample, decoded in decoders.map(((s, s.image) for s in samples), resizes): ...
    """

    def __init__(self, processes: int) -> None:
        if processes < 1:
            raise PlanError(f"decoders need at least 1 process, not {processes}")
        self.window = 4 * processes + 16
        self._processes = processes

    def __enter__(self) -> Self:
        self._threads = ThreadPoolExecutor(self._processes, thread_name_prefix="decoder")
        self._idle: SimpleQueue[_Decoder] = SimpleQueue()
        with _environment():
            self._decoders = [_Decoder() for _ in range(self._processes)]
        for decoder in self._decoders:
            self._idle.put(decoder)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._threads.shutdown(wait=True, cancel_futures=True)
        for decoder in self._decoders:
            decoder.close()

    def map(
        self,
        jobs: Iterable[tuple[T, bytes]],
        resizes: tuple[Resize, ...],
        views: Mapping[str, Any] = CENTER,
        key_hash: Callable[[T], bytes] = lambda _: b"",
    ) -> Iterator[tuple[T, Views]]:
        """Decode the image of every job; what comes with it comes back beside the result of `decode_views`.

        key_hash  of what comes with an image: what random views are drawn by

        Results keep the order of the jobs. `jobs` is pulled only as far ahead as the window reaches, so that memory
        stays bounded. Closing the iterator early cancels what has not begun.
        """
        remaining = iter(jobs)
        pending: deque[tuple[T, Future[Views]]] = deque()
        window = max(self._processes, self.window // views["per_image"])
        try:
            while True:
                for tag, image in islice(remaining, window - len(pending)):
                    job = image, resizes, views, key_hash(tag)
                    pending.append((tag, self._threads.submit(self._decode, *job)))
                if not pending:
                    return
                tag, future = pending.popleft()
                yield tag, future.result()
        finally:
            for _, future in pending:
                future.cancel()

    def _decode(self, *job: Any) -> Views:
        decoder = self._idle.get()
        try:
            return decoder.decode(*job)
        finally:
            self._idle.put(decoder)  # also a dead one: whoever waits here must find out


class _Decoder:
    """One process and our end of its pipe. Asked by one thread at a time, so neither end ever writes to a full pipe
    while the other does."""

    def __init__(self) -> None:
        self.connection, theirs = Pipe()
        self.process = SpawnProcess(target=_serve, args=(theirs,), daemon=True)
        self.process.start()
        theirs.close()  # or our pipe would not break when the process dies

    def decode(self, *job: Any) -> Views:
        """What `decode_views` makes of it."""
        try:
            self.connection.send(job)
            result: Views = self.connection.recv()
        except (OSError, EOFError) as error:
            self.process.join(1)
            raise EngineError(
                f"a decoder process died with exit code {self.process.exitcode}; -9 is most often the kernel short of "
                "memory: give the machine more of it or the plan fewer engine.decoders, and run again"
            ) from error
        return result

    def close(self) -> None:
        self.connection.close()
        self.process.join(10)
        self.process.kill()
        self.process.join()
        self.process.close()


def _serve(connection: "Connection[object, tuple[bytes, tuple[Resize, ...], Mapping[str, Any], bytes]]") -> None:
    """The life of a decoder process. It ends when the other end of the pipe is closed, be it by the parent's death."""
    # Ctrl-C reaches the whole process group; the driver decides when decoders end.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        while True:
            connection.send(decode_views(*connection.recv()))
    except (EOFError, OSError):
        return


@contextmanager
def _environment() -> Iterator[None]:
    """ENVIRONMENT for the processes that are started inside; ours is as before afterwards."""
    before = {name: os.environ.get(name) for name in ENVIRONMENT}
    os.environ.update(ENVIRONMENT)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name)
            if value is not None:
                os.environ[name] = value
