"""One worker process per visible GPU, or one on the CPU, on this machine."""

from __future__ import annotations

import contextlib
import logging
import multiprocessing
import signal
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from typing import Any

from statsvc.errors import EngineError, Interrupted, PlanError
from workers.engines.base import ATTEMPTS, EngineSetup
from workers.engines.dispatch import Work
from workers.engines.resources import decoder_processes, devices
from workers.unit.job import Result, Unit
from workers.unit.worker import Done, Failed, Images, Message, Ready, WorkerSetup, main

log = logging.getLogger("statsvc")
END_SECONDS = 5.0  # that an idle worker has to end by itself
POLL_SECONDS = 0.5  # how soon a request to stop is seen while all workers are busy


@dataclass(eq=False)
class _Worker:
    """A process, and the unit it works on.

    ended  it died, or ends itself after a failure: a unit that is sent there now would be lost, and count as tried
    """

    setup: WorkerSetup
    process: multiprocessing.process.BaseProcess
    connection: Connection[Any, Any]
    unit: Unit | None = None
    ended: bool = False


class InlineEngine:
    """Workers are spawned, so that each has a CUDA context of its own; units and messages travel over pipes."""

    def __init__(self, setup: EngineSetup) -> None:
        self._setup = setup
        self._workers: list[_Worker] = []

    def start(self) -> Ready:
        found = devices()
        for device in found:
            setup = WorkerSetup(
                store=self._setup.plan.store,
                teachers=self._setup.teachers,
                precisions=self._setup.precisions,
                device=device,
                threads=self._setup.threads,
                decoders=decoder_processes(self._setup.plan, len(found)),
            )
            self._workers.append(_spawn(setup))
        answers = [self._await_ready(number) for number in range(len(self._workers))]
        return answers[0]

    def run(self, units: Iterable[Unit], on_images: Callable[[Unit, int], None]) -> Iterator[Result]:
        work = Work(units, on_images)
        while True:
            for number, worker in enumerate(self._workers):
                if worker.unit is None and not self._setup.stopping.is_set():
                    unit = work.take()
                    if unit is not None:
                        self._assign(number, unit)
            busy = [worker for worker in self._workers if worker.unit is not None]
            if not busy:
                return
            by_connection = {worker.connection: worker for worker in busy}
            for connection in wait(list(by_connection), POLL_SECONDS):
                worker = by_connection[connection]  # type: ignore[index]
                message, unit = _receive(worker), worker.unit
                assert unit is not None  # it was busy
                if isinstance(message, Images):
                    work.report(unit, message.count)
                    continue
                answer = message if isinstance(message, (Done, Failed)) else _death(worker)
                worker.unit = None
                worker.ended = isinstance(answer, Failed) and not answer.reusable
                result = work.settle(unit, answer)
                if result is not None:
                    yield result

    def close(self) -> None:
        for worker in self._workers:
            if worker.unit is None:
                # Let it end itself: it may just be starting its decoders, which would complain of a dead parent.
                with contextlib.suppress(OSError):
                    worker.connection.send(None)
                worker.process.join(END_SECONDS)
            worker.process.kill()
            worker.process.join()
            worker.connection.close()
        self._workers.clear()

    def _assign(self, number: int, unit: Unit) -> None:
        while True:
            worker = self._workers[number]
            if not worker.ended:
                try:
                    worker.connection.send(unit)
                except OSError:  # it died while it had nothing to do
                    worker.ended = True
                else:
                    worker.unit = unit
                    return
            self._replace(number)

    def _replace(self, number: int) -> None:
        old = self._workers[number]
        old.process.kill()
        old.process.join()
        old.connection.close()
        self._workers[number] = _spawn(old.setup)
        self._await_ready(number)

    def _await_ready(self, number: int) -> Ready:
        for _ in range(ATTEMPTS):
            worker = self._workers[number]
            while not worker.connection.poll(POLL_SECONDS):
                # Loading takes as long as it takes; an end of the process wakes this up too.
                if self._setup.stopping.is_set():
                    raise Interrupted("interrupted while the teachers were loading; nothing was begun")
            message = _receive(worker)
            if isinstance(message, Ready):
                return message
            failure = message if isinstance(message, Failed) else _death(worker)
            log.debug("worker on %s did not start: %s", worker.setup.device, failure.details)
            if failure.kind == "plan":
                raise PlanError(failure.message)
            worker.process.join()
            worker.connection.close()
            self._workers[number] = _spawn(worker.setup)
        raise EngineError(f"the worker on {worker.setup.device} does not start: {failure.message}")


def _spawn(setup: WorkerSetup) -> _Worker:
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=main, args=(theirs, setup), name=f"statsvc worker {setup.device}")
    # The child begins with Ctrl-C blocked: it could not yet ignore it, and must not die of it while it is loading.
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    process.start()
    signal.pthread_sigmask(signal.SIG_SETMASK, before)
    theirs.close()  # so that its end shows as an end of the pipe
    return _Worker(setup, process, ours)


def _receive(worker: _Worker) -> Message | None:
    """The next message; None once the process has ended."""
    try:
        message: Message = worker.connection.recv()
    except (EOFError, OSError):
        return None
    return message


def _death(worker: _Worker) -> Failed:
    worker.process.join()
    code = worker.process.exitcode
    how = f"was killed by signal {-code}" if code is not None and code < 0 else f"ended with status {code}"
    return Failed("again", f"the worker process on {worker.setup.device} {how}", "no traceback: the process is gone")
