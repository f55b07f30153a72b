"""How fast shard files are written and read, next to numpy's own files and other Zarr implementations.

    python -m tests.benchmarks.shardfile [--dir FOLDER] [--rows 256] [--repeats 11]

All cases of a table take turns in one run, in a new order each time, and medians are compared, so that a slow moment
of the machine meets everyone. Before a reading is timed the same case runs untimed: measured, what zarr-python leaves
in the processor's caches costs its successor 3 us a row.

Rows are [256, 1024]. Everything is in the page cache: this measures the code, not the disk, except where
"+ fsync" says so; there the whole protocol runs (partial file, fsync, rename, fsync of the folder).
"""

import argparse
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import tensorstore
import zarr
import zarr.codecs
from numpy.typing import NDArray

from statsvc.shardfile import ShardFile, ShardWriter, open_shard
from tests.benchmarks.timing import Case, alternate

TOKENS, CHANNELS = 256, 1024
WRITE_BATCH = 16  # rows per append, as a teacher's batch brings them
READ_BATCH = 64


def warm_up(case: Case) -> None:
    case()


def report(title: str, seconds: dict[str, float], nbytes: int, goals: dict[str, tuple[str, float]]) -> None:
    """One line per case, with its ratio to the case that its goal names."""
    print(f"\n{title}")
    for name, each in seconds.items():
        line = f"  {name:<46} {each * 1e3:8.1f} ms {nbytes / each / 1e9:6.2f} GB/s"
        if name in goals:
            other, goal = goals[name]
            ratio = seconds[other] / each
            line += f"   {ratio:5.2f}x of {other}; goal {goal}x: {'met' if ratio >= goal else 'MISSED'}"
        print(line)


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


def create_array(path: Path, data_RTC: NDArray[Any]) -> zarr.Array[Any]:
    return zarr.create_array(
        store=str(path),
        shape=data_RTC.shape,
        chunks=(1, TOKENS, CHANNELS),
        shards=data_RTC.shape,
        dtype=data_RTC.dtype,
        serializer=zarr.codecs.BytesCodec(),
        compressors=[zarr.codecs.Crc32cCodec()],
        filters=None,
        overwrite=True,
    )


def write_with_zarr(path: Path, data_RTC: NDArray[Any]) -> None:
    create_array(path, data_RTC)[:] = data_RTC


def measure_writing(folder: Path, data_RTC: NDArray[Any], label: str, repeats: int) -> None:
    def clear(_: Case) -> None:
        for entry in folder.iterdir():
            shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
        os.sync()

    def shard(sync: bool) -> Case:
        return lambda: publish(folder, "shard", lambda file: write_shard(file, data_RTC), sync)

    def npy(sync: bool) -> Case:
        return lambda: publish(folder, "npy", lambda file: np.save(file, data_RTC), sync)

    synced = alternate({"shard file + fsync": shard(True), "np.save + fsync": npy(True)}, repeats, clear)
    report(f"write {label}", synced, data_RTC.nbytes, {"shard file + fsync": ("np.save + fsync", 0.85)})
    cases: dict[str, Case] = {
        "shard file": shard(False),
        "zarr-python": lambda: write_with_zarr(folder / "zarr", data_RTC),
        "np.save": npy(False),
    }
    unsynced = alternate(cases, repeats, clear)
    report(f"write {label}, nobody syncs", unsynced, data_RTC.nbytes, {"shard file": ("zarr-python", 3.0)})


def measure_reading(folder: Path, data_RTC: NDArray[Any], label: str, repeats: int) -> None:
    rows, row_nbytes = len(data_RTC), data_RTC[0].nbytes
    array = create_array(folder / "array", data_RTC)
    (folder / "array/c/0/0").mkdir(parents=True)
    publish(folder / "array/c/0/0", "0", lambda file: write_shard(file, data_RTC), sync=True)
    publish(folder, "npy", lambda file: np.save(file, data_RTC), sync=True)
    spec = {"driver": "zarr3", "kvstore": {"driver": "file", "path": str(folder / "array")}}
    tensors = tensorstore.open(spec).result()
    order = np.random.default_rng(0).permutation(rows).tolist()
    out_RX = np.zeros((rows, row_nbytes), np.uint8)
    out_RTC = out_RX.view(data_RTC.dtype).reshape(data_RTC.shape)

    def opened() -> ShardFile:
        return open_shard(folder / "array/c/0/0/0", rows, row_nbytes)

    def mapped() -> NDArray[Any]:
        return np.load(folder / "npy", mmap_mode="r")  # type: ignore[no-any-return]

    def in_batches(shard: ShardFile, rows_R: list[int]) -> None:
        for start in range(0, rows, READ_BATCH):
            shard.read(rows_R[start : start + READ_BATCH], out_RX[start : start + READ_BATCH])

    def one_by_one(each: Any) -> None:
        for j, row in enumerate(order):
            out_RTC[j] = each[row]

    def row_views(shard: ShardFile) -> None:
        for j, row in enumerate(order):
            out_RX[j] = shard.row(row)

    def tensorstore_rows() -> None:
        for j, row in enumerate(order):
            out_RTC[j] = tensors[row].read().result()

    shard, memory = opened(), mapped()
    shard.verify_all()
    row_views(shard)
    if not np.array_equal(out_RTC, data_RTC[order]):
        raise SystemExit("the rows read are not the rows written")
    opening = "opening, first touch: "
    scattered: dict[str, Case] = {
        "shard file, read()": lambda: in_batches(shard, order),
        "shard file, row()": lambda: row_views(shard),
        "np.memmap": lambda: one_by_one(memory),
        opening + "shard file, verifying": lambda: in_batches(opened(), order),
        opening + "np.memmap": lambda: one_by_one(mapped()),
        "tensorstore": tensorstore_rows,
        "zarr-python": lambda: one_by_one(array),
    }
    goals = dict.fromkeys(("shard file, read()", "shard file, row()"), ("np.memmap", 0.95))
    report(f"read {label}, rows in random order", alternate(scattered, repeats, warm_up), data_RTC.nbytes, goals)

    def memory_rows() -> None:
        for row in range(rows):
            out_RTC[row] = memory[row]

    def whole(source: Any) -> None:
        out_RTC[...] = source

    sequential: dict[str, Case] = {
        "shard file, read()": lambda: shard.read(range(rows), out_RX),
        "np.memmap, row by row": memory_rows,
        "np.memmap, one copy": lambda: whole(memory),
        opening + "shard file, verifying": lambda: opened().read(range(rows), out_RX),
        opening + "np.memmap, one copy": lambda: whole(mapped()),
        "tensorstore": lambda: whole(tensors.read().result()),
        "zarr-python": lambda: whole(array[:]),
    }
    goals = {"shard file, read()": ("np.memmap, row by row", 0.95)}
    report(f"read {label}, in order", alternate(sequential, repeats, warm_up), data_RTC.nbytes, goals)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dir", default=None, help="where the files go; default: the system's temporary folder")
    parser.add_argument("--rows", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=11)
    options = parser.parse_args()
    for dtype in ("float16", "int8"):
        random_RTC = np.random.default_rng(0).integers(-127, 128, (options.rows, TOKENS, CHANNELS), dtype=np.int8)
        data_RTC = random_RTC.astype(dtype)
        label = f"{options.rows} rows [{TOKENS}, {CHANNELS}] {dtype}"
        for measure in (measure_writing, measure_reading):
            with tempfile.TemporaryDirectory(dir=options.dir) as folder:
                measure(Path(folder), data_RTC, label, options.repeats)


if __name__ == "__main__":
    main()
