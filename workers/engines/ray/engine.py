"""Workers on the nodes of a Ray cluster: core actors, and a dispatch loop of our own.

Ray places actors and says when they are gone; what is done with a unit then is decided here. One unit is in flight per
actor. An actor gets work only after its first answer: one whose place is not free yet holds up nobody. Nodes are
looked at every few seconds, so that workers follow nodes that join; those of nodes that leave are lost and replaced.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from importlib.metadata import version
from itertools import count
from pathlib import Path
from typing import Any

from statsvc.errors import EngineError, Interrupted, PlanError
from workers.engines.base import ATTEMPTS, EngineSetup
from workers.engines.dispatch import Work
from workers.engines.ray.actor import Actor, Hello, Progress
from workers.engines.ray.cluster import Cluster, Node
from workers.engines.ray.nodes import absolute, check_same, death, told_room, with_absolute_paths
from workers.engines.resources import decoder_processes, worker_cpus
from workers.unit.job import Result, Unit
from workers.unit.worker import Done, Failed, Ready, WorkerSetup

log = logging.getLogger("statsvc")
POLL_SECONDS = 0.5  # how soon a request to stop is seen while all workers are busy
PROGRESS_SECONDS = 2.0  # between two questions how far a worker is
REFRESH_SECONDS = 3.0  # between two looks at the nodes
ROOM_SECONDS = 60.0  # that a cluster without a single worker has to find room for one


@dataclass(eq=False)
class _Worker:
    """An actor, the call that it has not answered yet, and the unit that it works on."""

    node: Node
    handle: Any
    answer: Any
    placed: bool = False
    ready: bool = False
    unit: Unit | None = None
    call: int = 0
    progress: Any = None
    asked: float = 0.0


class RayEngine:
    """As many workers as the nodes have room for by `cpus_per_worker`; where any has a GPU, one for each GPU."""

    def __init__(self, setup: EngineSetup) -> None:
        self._setup, self._plan = setup, setup.plan.engine
        self._workers: list[_Worker] = []
        self._cluster: Cluster | None = None
        self._ready: Ready | None = None
        self._wanted: dict[str, float] = {}
        self._failures: dict[str, int] = {}  # of workers to start, by node
        self._last_failure = ""
        self._calls = count(1)
        self._last_refresh = self._last_progress = 0.0

    def start(self) -> Ready:
        self._cluster = Cluster(self._plan.address or "local")
        self._wanted = self._wanted_of_a_node(self._cluster.nodes())
        self._last_progress = time.monotonic()
        while self._ready is None:
            if self._setup.stopping.is_set():
                raise Interrupted("interrupted while the teachers were loading; nothing was begun")
            self._refresh_nodes()
            self._fail_if_stalled()
            for _ in self._answers():
                pass  # before the first unit there are none
        return self._ready

    def run(self, units: Iterable[Unit], on_images: Callable[[Unit, int], None]) -> Iterator[Result]:
        work = Work(units, on_images)
        self._last_progress = time.monotonic()
        while True:
            self._refresh_nodes()
            stopping = self._setup.stopping.is_set()
            for worker in self._workers:
                if worker.ready and worker.unit is None and not stopping:
                    unit = work.take()
                    if unit is None:
                        break
                    self._assign(worker, unit)
            if not any(worker.unit for worker in self._workers):
                if stopping or not work.is_waiting():
                    return
                self._fail_if_stalled()
            for worker, answer in self._answers():
                if isinstance(answer, Progress):
                    if answer.call == worker.call and worker.unit is not None:
                        work.report(worker.unit, answer.images)
                    continue
                outcome, images = answer
                result = self._settle(worker, outcome, images, work)
                if result is not None:
                    yield result

    def close(self) -> None:
        if self._cluster is None:
            return
        with contextlib.suppress(EngineError):  # a cluster that is gone has no actors either
            for worker in self._workers:
                self._cluster.kill(worker.handle)
        self._workers.clear()
        self._cluster.close()

    def _wanted_of_a_node(self, nodes: list[Node]) -> dict[str, float]:
        """What each worker takes of its node. Raises PlanError where no node can ever have room."""
        has_gpus = any(node.total.get("GPU") for node in nodes)
        if isinstance(self._plan.gpus, int) and not has_gpus:
            raise PlanError(f"engine.gpus: {self._plan.gpus} are wanted, and the Ray cluster has none; remove it")
        if has_gpus and "bfloat16" not in self._setup.precisions.values() and _defaults_of_a_cpu():
            log.warning(
                "the Ray cluster has GPUs and this machine has none, so that what the plan leaves open was chosen for "
                "a CPU: set engine.gpus, or engine.batch_size and the precision of the teachers"
            )
        wanted = {"CPU": float(worker_cpus(self._setup.plan, 1))} | ({"GPU": 1.0} if has_gpus else {})
        if not any(node.slots(wanted) for node in nodes):
            raise PlanError(f"engine: no node of the Ray cluster has room for a worker: {told_room(wanted, nodes)}; "
                            "set engine.cpus_per_worker")  # fmt: skip
        return wanted

    def _refresh_nodes(self) -> None:
        """Start workers where there is room, every few seconds or when one was lost."""
        assert self._cluster is not None
        if time.monotonic() - self._last_refresh < REFRESH_SECONDS:
            return
        self._last_refresh = time.monotonic()
        limit = self._plan.gpus if isinstance(self._plan.gpus, int) else None
        room = []
        for node in self._cluster.nodes():
            here = [worker for worker in self._workers if worker.node.id == node.id]
            unplaced = sum(not worker.placed for worker in here)
            slots = min(node.slots(self._wanted) - len(here), node.slots(self._wanted, free=True) - unplaced)
            if self._failures.get(node.id, 0) < ATTEMPTS:
                room += [(len(here) + number, node) for number in range(slots)]
        for _, node in sorted(room, key=lambda found: (found[0], found[1].address)):
            if limit is None or len(self._workers) < limit:
                self._start_worker(node)

    def _start_worker(self, node: Node) -> None:
        assert self._cluster is not None
        handle = self._cluster.actor(Actor, node, self._wanted)
        self._workers.append(_Worker(node, handle, handle.hello.remote(str(Path.cwd()))))

    def _load(self, worker: _Worker) -> None:
        assert self._cluster is not None
        setup = WorkerSetup(
            store=absolute(self._setup.plan.store),
            teachers=self._setup.teachers,
            precisions=self._setup.precisions,
            device="auto" if "GPU" in self._wanted else "cpu",
            threads=self._setup.threads,
            decoders=decoder_processes(self._setup.plan, 1),
        )
        worker.placed = True
        worker.answer = worker.handle.load.remote(setup, not self._cluster.is_own)

    def _assign(self, worker: _Worker, unit: Unit) -> None:
        worker.unit, worker.call = unit, next(self._calls)
        worker.asked = time.monotonic()
        worker.answer = worker.handle.do.remote(with_absolute_paths(unit), worker.call)

    def _answers(self) -> Iterator[tuple[_Worker, Any]]:
        """What workers answer about units; what they answer before is seen to here. Waits for a moment at most."""
        assert self._cluster is not None
        ray, now = self._cluster.ray, time.monotonic()
        for worker in self._workers:
            if worker.unit is not None and worker.progress is None and now - worker.asked > PROGRESS_SECONDS:
                worker.asked = now
                worker.progress = worker.handle.progress.options(concurrency_group="progress").remote()
        asked = {worker.answer: worker for worker in self._workers if worker.answer is not None}
        asked |= {worker.progress: worker for worker in self._workers if worker.progress is not None}
        if not asked:
            time.sleep(POLL_SECONDS)
            return
        found, _ = ray.wait(list(asked), timeout=POLL_SECONDS)
        if found:
            found, _ = ray.wait(list(asked), num_returns=len(asked), timeout=0)
        for reference in found:
            worker = asked[reference]
            if worker not in self._workers:
                continue  # it was lost with the answer before this one
            try:
                answer = ray.get(reference)
            except ray.exceptions.RayError as error:
                if reference is worker.progress:
                    worker.progress = None
                    continue  # the call that it was about tells what has happened
                answer = death(worker.node.address, error)
            if reference is worker.progress:
                worker.progress = None
                yield worker, answer
                continue
            worker.answer = None
            if worker.unit is not None:
                yield worker, answer if isinstance(answer, tuple) else (answer, 0)
            else:
                self._on_start(worker, answer)

    def _on_start(self, worker: _Worker, answer: Hello | Ready | Failed) -> None:
        """A worker has its place, or its teachers, or cannot start."""
        where = f"node {worker.node.address}"
        if isinstance(answer, Hello):
            if answer.statsvc != (ours := version("statsvc")):
                problem = f"{where} has statsvc {answer.statsvc} and this driver {ours}; install the same on all nodes"
                self._refuse(worker, EngineError(problem))
                return
            log.debug("a worker has its place on %s: process %d", where, answer.pid)
            self._load(worker)
        elif isinstance(answer, Ready):
            try:
                check_same(worker.node.address, (self._ready or answer).environment, answer.environment)
            except EngineError as error:
                self._refuse(worker, error)
                return
            self._ready = self._ready or answer
            self._failures.pop(worker.node.id, None)
            worker.ready = True
        elif answer.kind == "plan":
            self._refuse(worker, PlanError(f"{answer.message}{self._on(worker)}"))
        elif "No module named" in answer.details and not worker.placed:
            problem = f"install statsvc[worker,ray] {version('statsvc')} there, for the Python that runs Ray"
            self._refuse(worker, EngineError(f"{where} cannot import statsvc; {problem}"))
        else:
            log.debug("a worker on %s did not start: %s", where, answer.details)
            self._drop_worker(worker)
            self._last_failure = f"{answer.message}{self._on(worker)}"
            self._failures[worker.node.id] = self._failures.get(worker.node.id, 0) + 1
            if self._failures[worker.node.id] == ATTEMPTS:
                log.warning("%s is left out, its workers do not start: %s", where, answer.message)

    def _refuse(self, worker: _Worker, problem: EngineError | PlanError) -> None:
        """Leave its node out; raises the problem where no other worker has shown that the plan is not to blame."""
        if self._ready is None:
            raise problem
        self._drop_worker(worker)
        self._failures[worker.node.id], self._last_failure = ATTEMPTS, str(problem)
        log.warning("node %s is left out: %s", worker.node.address, problem)

    def _settle(self, worker: _Worker, answer: Done | Failed, images: int, work: Work) -> Result | None:
        """Add what only this engine knows to an answer about a unit. images: that were done in the end."""
        unit, worker.unit = worker.unit, None
        assert unit is not None  # it was busy
        if isinstance(answer, Done):
            work.report(unit, images)
            log.debug("%s of %s is done%s", unit.phase, unit.name, self._on(worker))
            return work.settle(unit, answer)
        message = f"{answer.message}{self._on(worker)}"
        if answer.kind == "store" and not answer.details:
            message = (
                f"node {worker.node.address} does not see the store {self._setup.plan.store!r}: the path names "
                "another folder there; use a folder that all nodes share, or s3://"
            )
        if answer.kind != "store" and not answer.reusable:
            self._drop_worker(worker)
        return work.settle(unit, replace(answer, message=message))

    def _drop_worker(self, worker: _Worker) -> None:
        assert self._cluster is not None
        self._cluster.kill(worker.handle)
        self._workers.remove(worker)
        self._last_refresh = 0.0  # another takes its place at once

    def _fail_if_stalled(self) -> None:
        """Raises EngineError where nobody works, and nobody will."""
        assert self._cluster is not None
        if any(worker.placed for worker in self._workers):
            self._last_progress = time.monotonic()
            return
        nodes = self._cluster.nodes()
        usable = [node for node in nodes if self._failures.get(node.id, 0) < ATTEMPTS]
        if nodes and not usable:
            raise EngineError(f"no worker starts on any node: {self._last_failure}")
        if time.monotonic() - self._last_progress > ROOM_SECONDS:
            raise EngineError(
                f"no node of the Ray cluster had room for a worker for {ROOM_SECONDS:.0f} s: "
                f"{told_room(self._wanted, nodes)}; what is finished is kept"
            )

    def _on(self, worker: _Worker) -> str:
        assert self._cluster is not None
        return "" if self._cluster.is_own else f" (on node {worker.node.address})"


def _defaults_of_a_cpu() -> bool:
    import torch

    return not torch.cuda.device_count()
