"""A folder with dataset shards, a plan and a store, and processes that work there as a user starts them."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import psutil

from tests.support.commands import is_spawned
from tests.support.plans import write_plan

INSIDE = Path(__file__).with_name("inside")
PATH = os.pathsep.join([str(INSIDE), *filter(None, [os.environ.get("PYTHONPATH")])])  # where the teachers are found
TEACHER: dict[str, Any] = {
    "source": "python",
    "model": "models:steady",
    "size": 32,
    "interpolation": "bilinear",
    "mean": [0.5, 0.5, 0.5],
    "std": [0.25, 0.25, 0.25],
}
LONGEST = 300.0  # seconds that anything here may take before it counts as hanging


class Ended(NamedTuple):
    """How a command ended and what it said."""

    code: int
    printed: str
    errors: str

    @property
    def sentence(self) -> str:
        """The one line on standard error. A traceback is no sentence."""
        assert len(self.errors.strip().splitlines()) == 1, self.errors
        assert "Traceback" not in self.errors + self.printed
        assert "unexpected" not in self.errors
        return self.errors.strip()


@dataclass
class Site:
    """photographs in folder/photos, unless the plan names others; `store` may lie anywhere."""

    folder: Path
    location: str = ""

    def __post_init__(self) -> None:
        self.location = self.location or str(self.folder / "store")
        self.folder.mkdir(exist_ok=True)
        self.plan()

    @property
    def store(self) -> Path:
        return Path(self.location)

    @property
    def photos(self) -> Path:
        return self.folder / "photos"

    @property
    def tars(self) -> list[Path]:
        return sorted(self.photos.glob("*.tar"))

    def plan(self, **changes: Any) -> Path:
        """Write the plan anew, with some keys changed."""
        document = {
            "store": self.location,
            "data": {"shards": str(self.photos / "*.tar")},
            "teachers": {"own": TEACHER},
            "statistics": {"images": "all"},
            "engine": {"batch_size": 4, "decoders": 1},
            **changes,
        }
        return write_plan(self.folder, document)

    def run(self, *arguments: str, **faults: Any) -> Ended:
        """`statsvc run` to its end."""
        with self.started(*arguments, **faults) as driver:
            return driver.end()

    def command(self, name: str, *arguments: str, environment: dict[str, str] | None = None) -> Ended:
        """Another command on the store."""
        done = subprocess.run(
            [sys.executable, "-m", "statsvc.cli", name, "--store", self.location, *arguments],
            capture_output=True, text=True, timeout=LONGEST, check=False, env={**os.environ, **(environment or {})},
        )  # fmt: skip
        return Ended(done.returncode, done.stdout, done.stderr)

    def status(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self.command("status", "--json").printed)
        return found

    def run_with(self, place: str, meanwhile: Callable[[], object], **faults: Any) -> Ended:
        """A run to its end, which is told to wait at a place while something is done."""
        with self.started(hold=place, **faults) as driver:
            driver.wait_until_held()
            meanwhile()
            driver.release()
            return driver.end()

    @contextmanager
    def started(
        self,
        *arguments: str,
        environment: dict[str, str] | None = None,
        name: str = "faults",
        **faults: Any,
    ) -> Iterator[Driver]:
        """`statsvc run` in the background, with what inside/start.py is told; nothing of it outlives the block.

        name  of the folder where it is told to wait, and to go on
        """
        folder = self.folder / name
        folder.mkdir(exist_ok=True)
        for file in ("reached", "go"):
            (folder / file).unlink(missing_ok=True)
        told = {"FAULT_SETTINGS": json.dumps({"folder": str(folder), **faults}), "PYTHONPATH": PATH}
        with (folder / "printed").open("wb") as printed, (folder / "errors").open("wb") as errors:
            process = subprocess.Popen(
                [sys.executable, str(INSIDE / "start.py"), "run", str(self.folder / "plan.yaml"), *arguments],
                stdout=printed, stderr=errors, cwd=self.folder, start_new_session=True,
                env={**os.environ, **told, **(environment or {})},
            )  # fmt: skip
        driver = Driver(process, folder)
        try:
            yield driver
        finally:
            driver.kill_all()


@dataclass
class Driver:
    """A run that is going on."""

    process: subprocess.Popen[bytes]
    folder: Path

    def end(self) -> Ended:
        code = self.process.wait(LONGEST)
        return Ended(code, (self.folder / "printed").read_text(), (self.folder / "errors").read_text())

    def watched(self) -> tuple[Ended, int]:
        """How it ended, and the most memory in bytes that any of its processes ever had."""
        peak = 0
        while self.process.poll() is None:
            peak = max(peak, *map(peak_bytes, self.pids()))
            time.sleep(0.02)
        return self.end(), peak

    def wait_until_held(self) -> None:
        """Until one of its processes stands where it was told to wait."""
        self.wait_for((self.folder / "reached").exists)

    def release(self) -> None:
        (self.folder / "go").touch()

    def wait_for(self, condition: Callable[[], object]) -> None:
        end = time.monotonic() + LONGEST
        while not condition():
            assert self.process.poll() is None, self.end()
            assert time.monotonic() < end
            time.sleep(0.002)

    def pids(self) -> list[int]:
        """Of its workers, their decoders, and itself, which comes last."""
        try:
            below = psutil.Process(self.process.pid).children(recursive=True)
        except psutil.NoSuchProcess:
            below = []
        return [*(process.pid for process in below), self.process.pid]

    def workers(self) -> list[psutil.Process]:
        """The processes with a teacher in them."""
        try:
            children = psutil.Process(self.process.pid).children()
        except psutil.NoSuchProcess:
            return []
        return [child for child in children if is_spawned(child)]

    def signal_all(self, number: int) -> None:
        for pid in self.pids():
            os.kill(pid, number)

    def kill_all(self) -> None:
        """The driver and all that it started; the session is its own."""
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


def peak_bytes(pid: int) -> int:
    """The kernel's own high-water mark of a process."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return 0
    return next((int(line.split()[1]) << 10 for line in status.splitlines() if line.startswith("VmHWM")), 0)
