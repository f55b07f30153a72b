"""A worker: loads teachers once, then does one unit after the other. Here also as a process on the driver's machine."""

from __future__ import annotations

import errno
import multiprocessing
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from types import TracebackType
from typing import Any, Self

from statsvc.errors import DatasetShardError, PlanError, StatsvcError, StoreError, UnreadableShard
from statsvc.storage import open_backend
from statsvc.store.layout import Output
from workers.teachers.base import Resolved
from workers.unit.job import Unit

# Of teachers: the module of each, and the package it comes in.
LIBRARIES = {
    "transformers": "transformers",
    "timm": "timm",
    "open_clip": "open_clip_torch",
    "torchvision": "torchvision",
}


@dataclass(frozen=True, slots=True)
class WorkerSetup:
    """What a worker is started with. device: as torch names it; auto: the first visible GPU, else the CPU."""

    store: str
    teachers: dict[str, Resolved]
    precisions: dict[str, str]
    device: str
    threads: int
    decoders: int


@dataclass(frozen=True, slots=True)
class Ready:
    """Answer to the start: the shape of every teacher's outputs, and what computed it."""

    outputs: dict[str, dict[str, Output]]
    environment: dict[str, str]


@dataclass(frozen=True, slots=True)
class Images:
    """So many images of the unit are through all its teachers by now."""

    count: int


@dataclass(frozen=True, slots=True)
class Done:
    """The unit is committed."""


@dataclass(frozen=True, slots=True)
class Failed:
    """The unit is not done. `kind` says who must act: the plan, the store, this shard, or nobody (try again)."""

    kind: str  # plan | store | shard | again
    message: str
    details: str
    reusable: bool = False  # the process that says so can do the next unit


Message = Ready | Images | Done | Failed


class Worker:
    """Teachers, and inside a `with` block the decoder processes that units need. Raises whatever loading raises."""

    def __init__(self, setup: WorkerSetup) -> None:
        import torch

        from workers.unit.decoders import Decoders
        from workers.unit.device import configure_torch
        from workers.unit.loaded_teacher import LoadedTeacher

        configure_torch(setup.threads)
        name = "cuda:0" if torch.cuda.is_available() else "cpu"
        device = torch.device(name if setup.device == "auto" else setup.device)
        self._teachers = {
            name: LoadedTeacher(name, resolved, device, setup.precisions[name])
            for name, resolved in setup.teachers.items()
        }
        self.ready = Ready({name: t.outputs for name, t in self._teachers.items()}, _environment(device))
        self._store = open_backend(setup.store)
        self._decoders = Decoders(setup.decoders)

    def __enter__(self) -> Self:
        self._decoders.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._decoders.__exit__(kind, error, traceback)

    def do(self, unit: Unit, on_images: Callable[[int], None]) -> Done | Failed:
        """One unit. After a failure of kind `again`, nothing is known of this process's state: start another.

        on_images  is told how many images of the unit are done by now
        """
        from workers.unit.run_unit import run_unit

        done = 0

        def count(images: int) -> None:
            nonlocal done
            done += images
            on_images(done)

        try:
            run_unit(unit, self._store, self._teachers, self._decoders, count)
        except Exception as error:
            return failed(error)
        return Done()


def main(connection: Connection[Any, Any], setup: WorkerSetup) -> None:
    """Runs in a process of its own. Ctrl-C is the driver's business; the process ends with its driver."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_driver, daemon=True).start()
    try:
        worker = Worker(setup)
    except Exception as error:
        connection.send(failed(error))
        return
    connection.send(worker.ready)
    with worker:
        while (unit := connection.recv()) is not None:
            answer = worker.do(unit, lambda count: connection.send(Images(count)))
            connection.send(answer)
            if isinstance(answer, Failed) and not answer.reusable:
                return  # whatever state this process is in, the next one starts clean


def failed(error: Exception) -> Failed:
    """Who must act, for an error of a worker."""
    if isinstance(error, PlanError):
        kind = "plan"
    elif isinstance(error, (StoreError, OSError)):
        kind = "store"
    elif isinstance(error, DatasetShardError) and not isinstance(error, UnreadableShard):
        kind = "shard"
    else:
        kind = "again"
    message = str(error) if isinstance(error, StatsvcError) else f"{type(error).__name__}: {error}"
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        message = "the disk of the store is full; free some space, then run the same command to go on"
    return Failed(kind, message, traceback.format_exc(), reusable=isinstance(error, DatasetShardError))


def _environment(device: Any) -> dict[str, str]:
    """What the numbers were computed with, libraries that were loaded; recorded, not part of a fingerprint."""
    from importlib.metadata import version

    import torch

    packages = ["statsvc", "torch", "numpy", "pillow"]
    packages += [package for module, package in LIBRARIES.items() if module in sys.modules]
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    return {**{package: version(package) for package in packages}, "device": name}


def _end_with_driver() -> None:
    driver = multiprocessing.parent_process()
    if driver is not None:
        driver.join()
        os._exit(1)
