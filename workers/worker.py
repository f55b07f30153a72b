"""A worker process: loads teachers once, then does one unit after the other until its driver goes away."""

from __future__ import annotations

import errno
import multiprocessing
import os
import signal
import sys
import threading
import traceback
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

from statsvc.backends import backend
from statsvc.errors import DatasetShardError, PlanError, StatsvcError, StoreError, UnreadableShard
from statsvc.layout import Output
from workers.teachers.base import Resolved

# Of teachers: the module of each, and the package it comes in.
LIBRARIES = {
    "transformers": "transformers",
    "timm": "timm",
    "open_clip": "open_clip_torch",
    "torchvision": "torchvision",
}


@dataclass(frozen=True, slots=True)
class WorkerSetup:
    """What a worker is started with."""

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
    """So many images are through all teachers of the unit."""

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


Message = Ready | Images | Done | Failed


def main(connection: Connection[Any, Any], setup: WorkerSetup) -> None:
    """Runs in a process of its own. Ctrl-C is the driver's business; the process ends with its driver."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_driver, daemon=True).start()
    try:
        import torch

        from workers.decoders import Decoders
        from workers.teacher import LoadedTeacher
        from workers.unit import run_unit

        torch.set_num_threads(setup.threads)
        # Where the plan says float32 it means it: by default CUDA convolutions drop 13 bits of each factor.
        torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
        device = torch.device(setup.device)
        teachers = {
            name: LoadedTeacher(name, resolved, device, setup.precisions[name])
            for name, resolved in setup.teachers.items()
        }
        connection.send(Ready({name: t.outputs for name, t in teachers.items()}, _environment(device)))
    except Exception as error:
        connection.send(_failed(error))
        return
    store = backend(setup.store)
    with Decoders(setup.decoders) as decoders:
        while (unit := connection.recv()) is not None:
            try:
                run_unit(unit, store, teachers, decoders, lambda count: connection.send(Images(count)))
                connection.send(Done())
            except Exception as error:
                connection.send(_failed(error))
                if not isinstance(error, DatasetShardError):
                    return  # whatever state this process is in, the next one starts clean


def _failed(error: Exception) -> Failed:
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
    return Failed(kind, message, traceback.format_exc())


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
