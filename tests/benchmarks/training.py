"""How fast a training loop gets its batches: TargetDataset next to the loaders that people use for arrays.

Rows are [256, 1024] float16 in dataset shards of 256, as many bytes for all; batches of 64 in random order, each row
once in an epoch; everything is in the page cache. A consumer touches every page of every batch, as a copy to a device
would. All cases of a table take turns. Like `storage`, it runs in a second process, which alone sees the peers.

Suffixes: R = rows, B = rows of a batch, T = tokens, C = channels.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from statsvc.student import TargetDataset
from tests.benchmarks.peers import LitData, Mosaic, Peer, WebDataset
from tests.benchmarks.rows import Goal, Row, Table, versions
from tests.benchmarks.service import running, serve
from tests.benchmarks.storage import measured_beside_peers
from tests.benchmarks.timing import Case, alternate
from tests.support.ports import free_port
from tests.support.stores import MadeTeacher, write_store

SHARDS, ROWS, TOKENS, CHANNELS, BATCH = 4, 256, 256, 1024, 64
REPEATS, COLD_REPEATS = 5, 3
PAGE = 4096
PACKAGES = ("mosaicml-streaming", "litdata", "webdataset")
Batches = Callable[[], Iterator[Any]]
Load = Callable[[Path, int], Batches]  # from a folder and a number of workers
Loaders = dict[str, tuple[Path, Load]]


def tables() -> tuple[list[Table], dict[str, str]]:
    """The tables, and the versions of the peers."""
    return measured_beside_peers(__name__)


class Mapped(Dataset[torch.Tensor]):
    """The plain way: one .npy for each dataset shard, memory-mapped, one row at a time."""

    def __init__(self, folder: Path) -> None:
        self._shards = [np.load(path, mmap_mode="r") for path in sorted(folder.glob("*.npy"))]

    def __len__(self) -> int:
        return sum(map(len, self._shards))

    def __getitem__(self, row: int) -> torch.Tensor:
        return torch.from_numpy(np.array(self._shards[row // ROWS][row % ROWS]))


def mapped(folder: Path, workers: int) -> Batches:
    return lambda: iter(DataLoader(Mapped(folder), BATCH, shuffle=True, num_workers=workers))


def litdata(folder: Path, workers: int) -> Batches:
    library = importlib.import_module("litdata")
    # By default it decodes many rows for each that is asked for; see peers.
    rows = library.StreamingDataset(str(folder), shuffle=True, batch_decode=0)
    return lambda: (batch["x"] for batch in library.StreamingDataLoader(rows, batch_size=BATCH, num_workers=workers))


def mosaic(folder: Path, workers: int) -> Batches:
    # Of its two readers the faster one: its StreamingDataset also asks what to fetch next.
    rows = importlib.import_module("streaming").LocalDataset(str(folder))
    return lambda: (batch["x"] for batch in DataLoader(rows, BATCH, shuffle=True, num_workers=workers))


def webdataset(folder: Path, workers: int) -> Batches:
    library = importlib.import_module("webdataset")
    tars = sorted(map(str, folder.glob("*.tar")))

    def batches() -> Iterator[Any]:
        rows = library.WebDataset(tars, shardshuffle=len(tars), empty_check=False).shuffle(ROWS).decode()
        loaded = DataLoader(rows.to_tuple("npy").batched(BATCH), batch_size=None, num_workers=workers)
        return (torch.as_tensor(batch[0]) for batch in loaded)

    return batches


def ours(location: str | Path, workers: int, **options: Any) -> Batches:
    dataset = TargetDataset(location, batch_size=BATCH, **{"decode": False, **options})

    def arrays(batch: dict[str, Any]) -> Any:
        found = batch["targets"]["big"]["patches"]
        return found["values" if "values" in found else "codes"] if isinstance(found, dict) else found

    if not workers:
        return lambda: map(arrays, dataset)
    return lambda: map(arrays, DataLoader(dataset, batch_size=None, num_workers=workers))


# How each peer's own files are read in a training loop.
LOADERS: dict[str, tuple[Callable[[], Peer], Load]] = {
    "litData": (LitData, litdata),
    "MosaicML Streaming": (Mosaic, mosaic),
    "webdataset": (WebDataset, webdataset),
}


def consume(batches: Batches) -> int:
    """The rows that came."""
    rows = 0
    for batch in batches():
        batch.view(torch.uint8).flatten()[::PAGE].sum()
        rows += len(batch)
    return rows


def gigabytes(seconds: float) -> float:
    return 2 * SHARDS * ROWS * TOKENS * CHANNELS / seconds / 1e9


def measure(folder: Path) -> list[Table]:
    rng = np.random.default_rng(0)
    store = write_store(folder / "store", [ROWS] * SHARDS, {"big": MadeTeacher(TOKENS, CHANNELS, "float16")})
    data_RTC = rng.integers(-127, 128, (SHARDS * ROWS, TOKENS, CHANNELS), dtype=np.int8).astype(np.float16)
    (folder / "npy").mkdir()
    for shard in range(SHARDS):
        np.save(folder / "npy" / f"{shard}.npy", data_RTC[shard * ROWS : (shard + 1) * ROWS])
    loaders: Loaders = {"memmap DataLoader": (folder / "npy", mapped)}
    missing = {}
    for name, (make, load) in LOADERS.items():
        try:
            make().write(folder / name, data_RTC, ROWS)
            found = np.sort(np.concatenate([batch.numpy()[:, 0, :8] for batch in load(folder / name, 0)()]), axis=0)
            if not np.array_equal(found, np.sort(data_RTC[:, 0, :8], axis=0)):
                raise ValueError("it gives other rows")
            loaders[name] = folder / name, load
        except Exception as error:  # whatever foreign code comes across, the others are measured
            missing[name] = f"not measured: {type(error).__name__}: {error}".splitlines()[0]
    del data_RTC
    return [in_process(store, loaders, missing), in_workers(store, loaders, missing), resume(store), remote(store)]


def in_process(store: Path, loaders: Loaders, missing: dict[str, str]) -> Table:
    first_touch = "fresh batches, first epoch: verified"
    cases: dict[str, Case] = {name: epoch_of(load(place, 0)) for name, (place, load) in loaders.items()}
    cases["reused buffers"] = epoch_of(ours(store, 0, reuse_buffers=True))
    cases["fresh batches"] = epoch_of(ours(store, 0))
    decoded = {"decode": True, "space": "teacher"}
    cases["decoded to float32"] = epoch_of(ours(store, 0, **decoded))
    cases["decoded to float32, reused buffers"] = epoch_of(ours(store, 0, **decoded, reuse_buffers=True))
    cases[first_touch] = lambda: consume(ours(store, 0))
    rates = {name: gigabytes(seconds) for name, seconds in alternate(cases, REPEATS).items()}
    goals = {
        ("reused buffers", "memmap DataLoader"): 5.0,
        ("reused buffers", "litData"): 2.5,
        ("reused buffers", "MosaicML Streaming"): 2.5,
        ("reused buffers", "webdataset"): 5.0,
        ("fresh batches", "litData"): 1.1,
    }
    rows = [
        Row(what, rates[what], "GB/s", rates.get(name), name, goal=goal(goals, what, name), note=missing.get(name, ""))
        for what in ("reused buffers", "fresh batches")
        for name in (*loaders, *missing)
    ]
    base = "memmap DataLoader"
    rows += [
        Row(what, rates[what], "GB/s", rates[base], base)
        for what in (first_touch, "decoded to float32, reused buffers", "decoded to float32")
    ]
    note = (
        "GB/s of what is stored; decoded batches are twice as large. Ours verifies a crc32c at each row's first touch."
    )
    return Table("Batches of 64 rows [256, 1024] float16 in the training process", tuple(rows), note)


def in_workers(store: Path, loaders: Loaders, missing: dict[str, str]) -> Table:
    cases: dict[str, Case] = {name: epoch_of(load(place, 2)) for name, (place, load) in loaders.items()}
    cases["reused buffers"] = epoch_of(ours(store, 2, reuse_buffers=True))
    cases["fresh batches"] = epoch_of(ours(store, 2))
    rates = {name: gigabytes(seconds) for name, seconds in alternate(cases, REPEATS).items()}
    goals = {("reused buffers", "litData"): 1.2}
    rows = [
        Row(what, rates[what], "GB/s", rates.get(name), name, goal=goal(goals, what, name), note=missing.get(name, ""))
        for what in ("reused buffers", "fresh batches")
        for name in (*loaders, *missing)
    ]
    return Table("The same from two DataLoader workers, their start included", tuple(rows))


def goal(goals: dict[tuple[str, str], float], what: str, against: str) -> Goal | None:
    return Goal(goals[what, against]) if (what, against) in goals else None


def epoch_of(batches: Batches) -> Case:
    def case() -> None:
        if consume(batches) != SHARDS * ROWS:
            raise SystemExit("an epoch does not have each row once")

    return case


def resume(store: Path) -> Table:
    """From a state in the middle of an epoch to its next batch, in a dataset that is open."""
    dataset = TargetDataset(store, batch_size=BATCH, decode=False)
    half = len(dataset) // 2
    state = {**dataset.state_dict(), "step": half}
    seconds = []
    for _ in range(REPEATS):
        fresh = TargetDataset(store, batch_size=BATCH, decode=False)
        begun = time.perf_counter()
        fresh.load_state_dict(state)
        batch = next(iter(fresh))
        seconds.append(time.perf_counter() - begun)
        if batch["step"] != half:
            raise SystemExit("it went on elsewhere")
    milliseconds = 1000 * float(np.median(seconds))
    row = Row("from load_state_dict to the next batch", milliseconds, "ms", goal=Goal(100, at_most=True, of="ours"))
    return Table("Resume in mid-epoch", (row,))


def remote(store: Path) -> Table:
    """One epoch over loopback into an empty cache, beside the same first epoch from the local store."""
    port, found = free_port(), dict[str, list[float]]()
    with running(serve(store, port), port):
        for _ in range(COLD_REPEATS):
            for what, options in {"decoded": {"decode": True, "space": "teacher"}, "as stored": {}}.items():
                with tempfile.TemporaryDirectory() as cache:
                    for name, location in (("local", str(store)), ("cold", f"http://127.0.0.1:{port}")):
                        batches = ours(location, 0, cache=cache, window=ROWS, **options)
                        begun = time.perf_counter()
                        consume(batches)
                        found.setdefault(f"{what} {name}", []).append(gigabytes(time.perf_counter() - begun))
    rate = {name: float(np.median(each)) for name, each in found.items()}
    rows = [
        Row(
            f"{what}, first epoch over HTTP into an empty cache", rate[f"{what} cold"], "GB/s", rate[f"{what} local"],
            "the first epoch of the local store", goal=Goal(0.5),
        )
        for what in ("as stored", "decoded")
    ]  # fmt: skip
    return Table("A service on loopback, server and reader on the same cores", tuple(rows))


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    gc.disable()
    with tempfile.TemporaryDirectory() as place:
        measured = measure(Path(place))
    Path(sys.argv[1]).write_text(
        json.dumps({"tables": [table.as_json() for table in measured], "versions": versions(PACKAGES)})
    )
    sys.stdout.flush()
    os._exit(0)  # threads that peers leave behind may not end
