"""`statsvc` with a place where it waits, another clock, or other constants: `python start.py run PLAN`.

Workers and decoders are spawned from this file, so what it changes is changed in them as well. What that is says the
variable FAULT_SETTINGS, in JSON:
    hold       where to wait once: "fit", "commit PHASE SHARD", "begin N" or "rows N": before a process begins its N-th
               feature shard, or writes its N-th batch of rows
    folder     there `reached` is made by whoever comes to that place, who then waits for `go`
    clock      a file with the seconds by which the clock on the wall is off
    timing     other values for the seconds of statsvc.storage.lease.Timing
    constants  other values for constants of modules, in the order in which those are to be imported
"""

from __future__ import annotations

import importlib
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

FAULTS: dict[str, Any] = json.loads(os.environ.get("FAULT_SETTINGS", "{}"))
REAL_TIME = time.time


def shifted() -> float:
    """The clock on the wall, as somebody has set it."""
    return REAL_TIME() + float(Path(FAULTS["clock"]).read_text())


def wait_here() -> None:
    """Once, whichever process comes first."""
    folder = Path(FAULTS["folder"])
    try:
        os.close(os.open(folder / "reached", os.O_CREAT | os.O_EXCL))
    except FileExistsError:
        return
    while not (folder / "go").exists():
        time.sleep(0.005)


def waiting(function: Callable[..., Any], here: Callable[..., bool]) -> Callable[..., Any]:
    def held(*arguments: Any, **named: Any) -> Any:
        if here(*arguments):
            wait_here()
        return function(*arguments, **named)

    return held


def set_constants(constants: dict[str, float]) -> None:
    for name, value in constants.items():
        module, _, constant = name.rpartition(".")
        setattr(importlib.import_module(module), constant, value)


def set_timing(timing: dict[str, float]) -> None:
    from statsvc.storage import lease

    lease.TIMING = lease.Timing(**timing)


def set_hold(place: str, *which: str) -> None:
    from statsvc.store import commits, shard_file

    seen: list[None] = []

    def is_nth(*_: Any) -> bool:
        seen.append(None)
        return len(seen) == int(which[0])

    if place == "commit":
        phase, shard = which[0], int(which[1])
        commits.Ledger.write = waiting(  # type: ignore[method-assign]
            commits.Ledger.write, lambda _, commit: (commit.phase, commit.shard) == (phase, shard)
        )
    elif place == "begin":
        shard_file.ShardWriter.__init__ = waiting(shard_file.ShardWriter.__init__, is_nth)  # type: ignore[method-assign]
    elif place == "rows":
        shard_file.ShardWriter.append = waiting(shard_file.ShardWriter.append, is_nth)  # type: ignore[method-assign]
    elif __name__ == "__main__":  # the driver fits
        phases: Any = importlib.import_module("workers.driver.phases.fit")
        phases.fit_teacher = waiting(phases.fit_teacher, lambda *_: True)


if "clock" in FAULTS:
    time.time = shifted
set_constants(FAULTS.get("constants", {}))
if "timing" in FAULTS:
    set_timing(FAULTS["timing"])
if "hold" in FAULTS:
    set_hold(*FAULTS["hold"].split())

if __name__ == "__main__":
    from statsvc.cli import main

    main()
