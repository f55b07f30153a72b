"""What `tests.benchmarks.scale` measures, each in a process of its own, so that its memory is its own too.

    python -m tests.benchmarks.scale_store run FOLDER KILL_AFTER     the driver, killed after so many cached shards
    python -m tests.benchmarks.scale_store read LOCATION             statsvc.open of a path or a URL, and reading
    python -m tests.benchmarks.scale_store count LOCATION            the counting that /progress tells of
    python -m tests.benchmarks.scale_store train LOCATION CACHE      a TargetDataset's first batch
    python -m tests.benchmarks.scale_store command ARGUMENTS         a `statsvc` command

Driver, agenda, phases, lease, units, commits and arrays are the real ones. Only two things are not: the teacher, of
four tokens with twelve channels, and the processes around a unit, which is done where the driver is.

Each prints one line of JSON.
"""

from __future__ import annotations

import json
import math
import os
import signal
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch

import statsvc
import statsvc.cli
import workers.driver.run
from api.state.counts import Counts
from api.state.live_store import LiveStore
from statsvc.dataset.decode import Resize, decode_views
from statsvc.numerics.views import CENTER
from statsvc.plan import read_plan
from statsvc.progress import Display
from statsvc.storage import open_backend
from tests.support.in_process import FakeTeacher, InProcess
from workers.engines import ENGINES
from workers.engines.base import EngineSetup
from workers.unit.decoders import Decoders, Views
from workers.unit.job import Result, Unit
from workers.unit.worker import Ready

TEACHER = "fake"


class Patches(FakeTeacher):
    """One output: a summary would be as many objects again, and cost the driver nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.outputs = {"patches": self.outputs["patches"]}

    def __call__(self, images_BSS3: np.ndarray, extents_B2: np.ndarray | None = None) -> dict[str, torch.Tensor]:
        return {"patches": super().__call__(images_BSS3, extents_B2)["patches"]}


class DecodeHere:
    """Decoders without processes, for images that take less time than a pipe."""

    def map(
        self, jobs: Iterable[tuple[Any, bytes]], resizes: tuple[Resize, ...], views: Mapping[str, Any] = CENTER,
        key_hash: Any = lambda _: b"",
    ) -> Iterator[tuple[Any, Views]]:  # fmt: skip
        for tag, image in jobs:
            yield tag, decode_views(image, resizes, views, key_hash(tag))


class Clocked(InProcess):
    """Does units in this process, and tells the seconds inside of them from those of the driver."""

    def __init__(self, setup: EngineSetup, figures: dict[str, float], kill_after: int) -> None:
        super().__init__(setup, cast(Decoders, DecodeHere()))
        self._figures, self._kill_after = figures, kill_after
        self._begun = 0.0

    def start(self) -> Ready:
        self._figures["ready"] = time.monotonic()
        self._loaded = {TEACHER: Patches()}
        return Ready({TEACHER: self._loaded[TEACHER].outputs}, {"device": "cpu"})

    def run(self, units: Iterable[Unit], *arguments: Any) -> Iterator[Result]:
        for result in super().run(self._pulled(units), *arguments):
            now = time.monotonic()
            self._count(result.unit.phase, now)
            if result.unit.phase == "cache" and self._figures["cache_units"] == self._kill_after:
                print(json.dumps(ended(self._figures)), flush=True)
                os.kill(os.getpid(), signal.SIGKILL)
            yield result

    def _pulled(self, units: Iterable[Unit]) -> Iterator[Unit]:
        for unit in units:
            self._begun = time.monotonic()
            self._figures.setdefault("first_unit", self._begun)
            self._figures.setdefault(f"{unit.phase}_begun", self._begun)
            yield unit

    def _count(self, phase: str, now: float) -> None:
        found = self._figures
        found[f"{phase}_units"] = found.get(f"{phase}_units", 0) + 1
        found[f"{phase}_inside"] = found.get(f"{phase}_inside", 0.0) + now - self._begun
        found[f"{phase}_ended"] = now


def run(folder: str, kill_after: str) -> dict[str, float]:
    """Seconds on one clock, and megabytes."""
    figures: dict[str, float] = {"imported_MB": peak_megabytes(), "begun": time.monotonic()}
    ENGINES["inline"] = lambda setup: Clocked(setup, figures, int(kill_after))
    torch.set_num_threads(1)
    figures["code"] = workers.driver.run.run(read_plan(Path(folder, "plan.yaml")), Display())
    return figures


def read(location: str) -> dict[str, float]:
    """Seconds until a store, its teacher and its targets are there, of a first read, and of the list of all rows."""
    figures = {"imported_MB": peak_megabytes()}
    begun = time.monotonic()
    targets = statsvc.open(location).teacher(TEACHER).targets("patches")
    figures["open"] = time.monotonic() - begun
    figures["first_read"] = seconds(lambda: targets.read([0]))
    # Rows of as many dataset shards; each is opened by the read.
    count = len(targets.teacher.store.ledger.shards("cache", TEACHER, targets.set))
    chosen = np.random.default_rng(0).integers(0, count, 256) * targets.teacher.store.rows_per_shard
    figures["random_read"] = seconds(lambda: targets.read(chosen)) / len(chosen)
    if "://" not in location:  # it opens every feature shard
        figures["rows"] = seconds(targets.rows)
    return figures


def count(location: str) -> dict[str, float]:
    """Seconds that the service's counting takes: all commits, and then those that are new, of which there are none."""
    counts, figures = Counts(LiveStore(open_backend(location))), dict[str, float]()
    figures["first"] = seconds(counts.now)
    counts._taken = counts._took = -math.inf
    figures["again"] = seconds(counts.now)
    return figures


def train(location: str, cache: str) -> dict[str, float]:
    """Seconds until a training job has its first batch."""
    from statsvc.student import TargetDataset

    figures = {"imported_MB": peak_megabytes()}

    def first_batch() -> None:
        next(iter(TargetDataset(location, teachers=[TEACHER], batch_size=64, cache=cache)))

    figures["first_batch"] = seconds(first_batch)
    return figures


def command(*arguments: str) -> dict[str, float]:
    """A `statsvc` command that ends well, and prints what it likes."""
    with Path(os.devnull).open("w") as nowhere, redirect_stdout(nowhere):
        code = statsvc.cli.cli.main(list(arguments), standalone_mode=False)
    return {"code": code}


def seconds(what: Any) -> float:
    begun = time.monotonic()
    what()
    return time.monotonic() - begun


def peak_megabytes(process: str | int = "self") -> float:
    """Not from getrusage: that begins with what the process had that started this one."""
    lines = Path(f"/proc/{process}/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 / 1e6 for line in lines if line.startswith("VmHWM"))


MEASURES: dict[str, Callable[..., dict[str, float]]] = {
    "run": run,
    "command": command,
    "read": read,
    "count": count,
    "train": train,
}


def measured(what: str, *arguments: str) -> dict[str, float]:
    """What this was started for, with the time and the memory that it took in the end."""
    return ended(MEASURES[what](*arguments))


def ended(figures: dict[str, float]) -> dict[str, float]:
    return {**figures, "now": time.monotonic(), "peak_MB": peak_megabytes()}


if __name__ == "__main__":
    print(json.dumps(measured(*sys.argv[1:])))
