"""A worker on a node of a Ray cluster."""

from __future__ import annotations

import contextlib
import os
import sys
import time
from dataclasses import dataclass, replace
from importlib.metadata import version

from statsvc.errors import PlanError
from statsvc.storage import open_backend
from statsvc.storage.fence import RELEASED
from statsvc.storage.lease import read_lease
from workers.teachers import resolve
from workers.teachers.base import Resolved
from workers.unit.job import Unit
from workers.unit.worker import Done, Failed, Ready, Worker, WorkerSetup, failed

SEEN_SECONDS = 10.0  # that a network file system may take to show a new file on another node


@dataclass(frozen=True, slots=True)
class Hello:
    """The first answer: the actor has its place, and this is installed there."""

    pid: int
    statsvc: str


@dataclass(frozen=True, slots=True)
class Progress:
    """So many images of the call with that number are through."""

    call: int
    images: int


class Actor:
    """Calls come one at a time and in order; `progress` may come at any time, in a concurrency group of its own."""

    def __init__(self) -> None:
        # Decoder processes would begin by importing the main program of this process, which is Ray's.
        vars(sys.modules["__main__"]).pop("__file__", None)
        self._progress = Progress(0, 0)
        self._sees_store = False

    def hello(self, folder: str) -> Hello:
        """folder: of the driver, where relative paths of the plan begin."""
        with contextlib.suppress(OSError):
            os.chdir(folder)
        return Hello(os.getpid(), version("statsvc"))

    def load(self, setup: WorkerSetup, elsewhere: bool) -> Ready | Failed:
        """Load the teachers and start the decoder processes, which end with this one.

        elsewhere  this may be another machine than the driver's, with other files
        """
        try:
            self._store = open_backend(setup.store)
            if elsewhere:
                setup = replace(setup, teachers={n: _found_here(n, teacher) for n, teacher in setup.teachers.items()})
            self._worker = Worker(setup).__enter__()
        except Exception as error:
            return failed(error)
        return self._worker.ready

    def do(self, unit: Unit, call: int) -> tuple[Done | Failed, int]:
        """The answer, and how many images are through."""
        self._progress = Progress(call, 0)
        if unit.lease and not self._finds_the_lease():
            return Failed("store", "does not see the store that the driver writes to", ""), 0

        def on_images(images: int) -> None:
            self._progress = Progress(call, images)

        return self._worker.do(unit, on_images), self._progress.images

    def progress(self) -> Progress:
        """Of the call that is going on, or was."""
        return self._progress

    def _finds_the_lease(self) -> bool:
        """Whether the store is the driver's: a path may name another folder on every machine."""
        deadline = time.monotonic() + SEEN_SECONDS
        while not self._sees_store:
            # One that is released was left by an earlier run, in this store or in another folder of that name.
            self._sees_store = read_lease(self._store) not in (None, RELEASED)
            if not self._sees_store:
                if time.monotonic() > deadline:
                    return False
                time.sleep(0.5)
        return True


def _found_here(name: str, teacher: Resolved) -> Resolved:
    """The teacher with the files of this machine. Raises PlanError where they are others."""
    here = resolve(name, teacher.plan)
    if here.weights != teacher.weights:
        raise PlanError(
            f"teachers.{name}.model: {teacher.plan.model!r} has other weights than on the driver's machine; give all "
            "nodes the same files, or set revision"
        )
    return replace(teacher, location=here.location)
