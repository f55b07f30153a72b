"""How fast shard files are written and read, next to numpy's own files and everything else that holds arrays.

Rows are [256, 1024] float16, 128 to a shard, and numbers are the same for all. Everything is in the page cache: this
measures the code, not the disk, except where "+ fsync" says so; there the whole protocol runs (partial file, fsync,
rename, fsync of the folder). All cases of a table take turns in one process.

That process is a second one, because the peers are not part of the development environment (see peers.txt): they lie
in a folder of their own, which only that process sees.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from statsvc.store.shard_file import ShardFile, ShardWriter
from tests.benchmarks.peers import Peer, working_peers
from tests.benchmarks.rows import Goal, Row, Table, versions
from tests.benchmarks.timing import Case, alternate, warm_up
from tests.support.shards import open_shard

ROWS, TOKENS, CHANNELS = 128, 256, 1024
WRITE_BATCH = 16  # rows per append, as a teacher's batch brings them
READ_BATCH = 64
REPEATS = 11
PEERS_FOLDER = Path(".bench-peers")
PACKAGES = ("zarr", "tensorstore", "mosaicml-streaming", "litdata", "safetensors", "webdataset")
# Against the copy that numpy makes of a mapped file, one row at a time: the least that reading can cost.
LIMIT = "np.memmap"


def tables() -> tuple[list[Table], dict[str, str]]:
    """The tables, and the versions of the peers."""
    return measured_beside_peers(__name__)


def measured_beside_peers(module: str) -> tuple[list[Table], dict[str, str]]:
    """What a module writes into the file that it is given, in a process that sees the peers."""
    paths = [str(PEERS_FOLDER.resolve()), *filter(None, [os.environ.get("PYTHONPATH")])]
    environ = os.environ | {"PYTHONPATH": os.pathsep.join(paths)}
    with tempfile.NamedTemporaryFile(suffix=".json") as result:
        # What peers print goes to the terminal, so the result does not go through standard output.
        subprocess.run([sys.executable, "-m", module, result.name], env=environ, check=True)
        found = json.loads(Path(result.name).read_text())
    return [Table.from_json(table) for table in found["tables"]], found["versions"]


def publish(folder: Path, name: str, write: Callable[[Any], object], sync: bool) -> None:
    partial = folder / f"{name}.partial-0"
    with partial.open("wb") as file:
        write(file)
        file.flush()
        if sync:
            os.fsync(file.fileno())
    partial.replace(folder / name)
    if sync:
        descriptor = os.open(folder, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)


def write_shard(file: Any, data_RTC: NDArray[Any]) -> None:
    writer = ShardWriter(file, len(data_RTC), data_RTC[0].nbytes)
    for start in range(0, len(data_RTC), WRITE_BATCH):
        batch_NTC = data_RTC[start : start + WRITE_BATCH]
        writer.append(range(start, start + len(batch_NTC)), batch_NTC)
    writer.finish()


def measure_writing(folder: Path, data_RTC: NDArray[Any], peers: dict[str, Peer], missing: dict[str, str]) -> Table:
    def clear(_: Case) -> None:
        for entry in folder.iterdir():
            shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
        os.sync()

    def shard(sync: bool) -> Case:
        return lambda: publish(folder, "shard", lambda file: write_shard(file, data_RTC), sync)

    def npy(sync: bool) -> Case:
        return lambda: publish(folder, "npy", lambda file: np.save(file, data_RTC), sync)

    cases: dict[str, Case] = {"shard": shard(False), "np.save": npy(False)}
    for name, peer in peers.items():
        cases[name] = lambda peer=peer: peer.write(folder / "peer", data_RTC)  # type: ignore[misc]
    synced = alternate({"shard": shard(True), "np.save": npy(True)}, REPEATS, clear)
    seconds = alternate(cases, REPEATS, clear)
    rate = {name: data_RTC.nbytes / each / 1e9 for name, each in seconds.items()}
    synced_rate = {name: data_RTC.nbytes / each / 1e9 for name, each in synced.items()}
    rows = [
        Row("write + fsync", synced_rate["shard"], "GB/s", synced_rate["np.save"], "np.save + fsync", goal=Goal(0.9)),
        Row("write, nobody syncs", rate["shard"], "GB/s", rate["np.save"], "np.save", goal=Goal(0.58)),
    ]
    for name in peers:
        rows.append(Row("write, nobody syncs", rate["shard"], "GB/s", rate[name], name, goal=Goal(1)))
    rows += [Row("write, nobody syncs", rate["shard"], "GB/s", None, name, note=why) for name, why in missing.items()]
    note = "Ours, zarr-python and tensorstore store a crc32c of every row; the others store no checksums."
    title = f"Writing a shard of {len(data_RTC)} rows [256, 1024] {data_RTC.dtype}"
    return Table(title, (*rows,), note if peers else "Ours stores a crc32c of every row.")


def measure_reading(
    folder: Path, data_RTC: NDArray[Any], peers: dict[str, Peer], missing: dict[str, str]
) -> list[Table]:
    rows, row_nbytes = len(data_RTC), data_RTC[0].nbytes
    publish(folder, "shard", lambda file: write_shard(file, data_RTC), sync=True)
    publish(folder, "npy", lambda file: np.save(file, data_RTC), sync=True)
    order = np.random.default_rng(0).permutation(rows).tolist()
    out_RX = np.zeros((rows, row_nbytes), np.uint8)
    out_RTC = out_RX.view(data_RTC.dtype).reshape(data_RTC.shape)

    def opened() -> ShardFile:
        return open_shard(folder / "shard", rows, row_nbytes)

    def mapped() -> NDArray[Any]:
        return np.load(folder / "npy", mmap_mode="r")  # type: ignore[no-any-return]

    def in_batches(shard: ShardFile) -> None:
        for start in range(0, rows, READ_BATCH):
            shard.read(order[start : start + READ_BATCH], out_RX[start : start + READ_BATCH])

    def one_by_one(row_of: Callable[[int], NDArray[Any]]) -> Case:
        def read() -> None:
            for j, row in enumerate(order):
                out_RTC[j] = row_of(row)

        return read

    def in_order(memory: NDArray[Any]) -> None:
        for row in range(rows):
            out_RTC[row] = memory[row]

    shard, memory = opened(), mapped()
    shard.verify_all()
    in_batches(shard)
    if not np.array_equal(out_RTC, data_RTC[order]):
        raise SystemExit("the rows read are not the rows written")
    scattered: dict[str, Case] = {
        "ours": lambda: in_batches(shard),
        LIMIT: one_by_one(memory.__getitem__),
        "ours, first touch": lambda: in_batches(opened()),
        f"{LIMIT}, first touch": lambda: one_by_one(mapped().__getitem__)(),
    }
    sequential: dict[str, Case] = {
        "ours": lambda: shard.read(range(rows), out_RX),
        LIMIT: lambda: in_order(memory),
        "np.memmap in one copy": lambda: np.copyto(out_RTC, memory),
        "ours, first touch": lambda: opened().read(range(rows), out_RX),
        f"{LIMIT}, first touch": lambda: in_order(mapped()),
    }
    no_order = {}
    for number, (name, peer) in enumerate(peers.items()):
        peer.write(folder / f"peer{number}", data_RTC)
        sequential[name] = peer.read_all(folder / f"peer{number}", out_RTC)
        row_of = peer.rows(folder / f"peer{number}")
        if row_of:
            scattered[name] = one_by_one(row_of)
        else:
            no_order[name] = "only in the order of the file"
    random_us = {name: each / rows * 1e6 for name, each in alternate(scattered, REPEATS, warm_up).items()}
    rate = {name: data_RTC.nbytes / each / 1e9 for name, each in alternate(sequential, REPEATS, warm_up).items()}
    goals = {LIMIT: Goal(0.95)} | dict.fromkeys(peers, Goal(1))
    of = f"rows [256, 1024] {data_RTC.dtype}"

    def table(title: str, found: dict[str, float], unit: str, less: bool, absent: dict[str, str]) -> Table:
        rows_found = []
        for name in found:
            if not name.startswith("ours"):
                verifying = name.endswith("first touch")
                ours, what = (
                    ("ours, first touch", "opening, first touch: verified") if verifying else ("ours", "opened")
                )
                row = Row(what, found[ours], unit, found[name], name, "less" if less else "more", goals.get(name))
                rows_found.append(row)
        rows_found += [Row("opened", found["ours"], unit, None, name, note=why) for name, why in absent.items()]
        return Table(title, tuple(rows_found))

    return [
        table(f"Reading a shard in order, {of}", rate, "GB/s", False, missing),
        table(f"Reading single {of}, in random order", random_us, "us a row", True, no_order | missing),
    ]


def measure() -> list[Table]:
    random_RTC = np.random.default_rng(0).integers(-127, 128, (ROWS, TOKENS, CHANNELS), dtype=np.int8)
    found = []
    for dtype, compared in (("float16", True), ("int8", False)):
        data_RTC = random_RTC.astype(dtype)
        with tempfile.TemporaryDirectory() as folder:
            peers, missing = working_peers(Path(folder), data_RTC) if compared else ({}, {})
            missing = {name: f"not measured: {why}" for name, why in missing.items()}
            found.append(measure_writing(Path(folder), data_RTC, peers, missing))
        with tempfile.TemporaryDirectory() as folder:
            found += measure_reading(Path(folder), data_RTC, peers, missing)
    return found


if __name__ == "__main__":
    found = {"tables": [table.as_json() for table in measure()], "versions": versions(PACKAGES)}
    Path(sys.argv[1]).write_text(json.dumps(found))
    sys.stdout.flush()
    os._exit(0)  # threads that peers leave behind may not end
