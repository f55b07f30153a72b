"""`make scale`: one teacher over 100,000 dataset shards, and what that costs everyone who handles them.

    python -m tests.benchmarks.scale [--shards 100000] [--folder /dev/shm] [--json RECORD] [--readme README.md]
    python -m tests.benchmarks.scale --from RECORD --readme README.md      writes the tables of a record again

The driver is killed when all but ten dataset shards are cached, and taken up again. On the finished store, everything
that looks at all of it is timed: `run`, `statsvc.open`, status, verify, the service and its clients, each in a process
of its own. Measured at a hundredth, a tenth and all of `--shards`, so that what is not linear shows.

Tars are a few hundred different ones of two tiny images under many names; the teacher has four tokens of twelve
channels. Store and tars lie in memory: a million small files on a disk that is asked to sync each of them would measure
that disk. 100,000 dataset shards are a million files of a page each, so 4 GB and what the kernel keeps of every file.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import yaml

from tests.benchmarks.report import markdown, replace_block, terminal, write_record
from tests.benchmarks.report import read_record as read_tables
from tests.benchmarks.rows import Goal, Row, Table, environment, number
from tests.benchmarks.scale_store import peak_megabytes
from tests.support.ports import free_port, wait_until_listening
from tests.support.tiny import photograph, write_tar

DIFFERENT, IMAGES = 300, 2  # tars, and images of each
PILOT_IMAGES = 400
LEFT = 10  # dataset shards that are still to be cached when the driver is killed
PAGE = 1000  # entries of a page of /shards
TEACHER = {"source": "random-vit", "model": "dinov2", "size": 16}  # whose weights are never drawn: see scale_store
PACKAGES = ("statsvc", "numpy", "torch", "zarr", "fastapi", "uvicorn")

Figures = dict[str, float]


def write_tars(folder: Path, shards: int) -> None:
    """So many names for a few different tars."""
    folder.mkdir()
    different = [
        write_tar(folder / f"{n:06d}.tar", [(f"{n}-{i}.jpg", photograph(n * IMAGES + i, 10, 8)) for i in range(IMAGES)])
        for n in range(min(shards, DIFFERENT))
    ]
    for n in range(len(different), shards):
        os.link(different[n % len(different)], folder / f"{n:06d}.tar")


def write_plan(folder: Path) -> Path:
    document = {
        "store": str(folder / "store"),
        "data": {"shards": f"{folder}/tars/*.tar", "rows_per_shard": IMAGES},
        "teachers": {"fake": TEACHER},
        "statistics": {"images": PILOT_IMAGES},
        "engine": {"batch_size": IMAGES, "decoders": 1},
    }
    path = folder / "plan.yaml"
    path.write_text(yaml.safe_dump(document))
    return path


def child(*arguments: str) -> Figures:
    """What a process of scale_store tells."""
    command = [sys.executable, "-m", "tests.benchmarks.scale_store", *arguments]
    begun = time.monotonic()
    ended = subprocess.run(command, capture_output=True, text=True)
    lines = ended.stdout.strip().splitlines()
    if ended.returncode not in (0, -9) or not lines or not lines[-1].startswith("{"):
        raise RuntimeError(f"{' '.join(arguments)} ended with {ended.returncode}: {ended.stdout}{ended.stderr}")
    return {**json.loads(lines[-1]), "process": time.monotonic() - begun}


def command(*arguments: str) -> Figures:
    """Seconds, from the start of Python on, and megabytes of a `statsvc` command that ends well."""
    told = child("command", *arguments)
    if told["code"]:
        raise RuntimeError(f"statsvc {' '.join(arguments)} ended with {told['code']}")
    return {"seconds": told["process"], "MB": told["peak_MB"]}


def driver(folder: Path, shards: int) -> Figures:
    """A run that is killed near its end, and the one that takes it up."""
    first = child("run", str(folder), str(max(shards - LEFT, 1)))
    again = child("run", str(folder), "-1")
    if again["code"] or first["cache_units"] + again["cache_units"] != shards:
        raise RuntimeError(f"of {shards} dataset shards, {first} and {again} were cached")
    inside = first["measure_inside"] + first["cache_inside"]
    whole = first["now"] - first["begun"]
    return {
        "a run to its end": whole,
        "start until the first unit": first["first_unit"] - first["begun"],
        "driver, outside of units": whole - inside,
        "driver, per unit it hands out": 1e6
        * (first["cache_ended"] - first["cache_begun"] - first["cache_inside"])
        / first["cache_units"],
        "a unit": 1e3 * first["cache_inside"] / first["cache_units"],
        "after a kill, until its first unit": again["first_unit"] - again["begun"],
        "after a kill, until the end": again["now"] - again["begun"],
        "memory of the driver": first["peak_MB"],
    }


def readers(folder: Path) -> Figures:
    """Commands and readers on a finished store."""
    store, plan = str(folder / "store"), str(folder / "plan.yaml")
    run, status, verify = command("run", plan), command("status", "--store", store), command("verify", "--store", store)
    local, batch = child("read", store), child("train", store, str(folder / "cache"))
    return {
        "statsvc run, nothing to do": run["seconds"],
        "its memory": run["MB"],
        "statsvc status": status["seconds"],
        "memory of status": status["MB"],
        "statsvc verify": verify["seconds"],
        "memory of verify": verify["MB"],
        "statsvc.open, teacher, targets": local["open"],
        "first read": local["first_read"],
        "a row of another dataset shard": 1e6 * local["random_read"],
        "rows()": local["rows"],
        "TargetDataset until its first batch": batch["first_batch"],
        "memory of TargetDataset": batch["peak_MB"] - batch["imported_MB"],
    }


@contextmanager
def service(store: Path) -> Iterator[tuple[str, int]]:
    port = free_port()
    statsvc = str(Path(sys.executable).parent / "statsvc")
    process = subprocess.Popen(
        [statsvc, "serve", "--store", str(store), "--port", str(port)], stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        wait_until_listening(port, process)
        yield f"http://127.0.0.1:{port}", process.pid
    finally:
        process.terminate()
        process.wait(60)


def served(folder: Path, shards: int) -> Figures:
    """The service and its clients."""
    begun = time.monotonic()
    with service(folder / "store") as (url, process), httpx.Client(base_url=url, timeout=600) as client:
        found = {"service until it listens": time.monotonic() - begun}

        def timed(name: str, path: str) -> Any:
            begun = time.monotonic()
            answer = client.get(path).raise_for_status().json()
            found[name] = time.monotonic() - begun
            return answer

        progress = timed("first /progress", "/progress")
        if progress["state"] != "finished" or progress["dataset_shards"]["indexed"] != shards:
            raise RuntimeError(f"the service says {progress}")
        found["counting again for /progress"] = child("count", str(folder / "store"))["again"]
        timed("first page of /shards", f"/teachers/fake/shards?limit={PAGE}")
        timed("last page of /shards", f"/teachers/fake/shards?limit={PAGE}&start={max(shards - PAGE, 0)}")
        timed("/samples/{key}", "/samples/1-0")
        timed("/samples/{key}, again", "/samples/2-1")
        remote = child("read", url)
        batch = child("train", url, str(folder / "cache"))
        found["statsvc.open(http://...)"] = remote["open"]
        found["its first read"] = remote["first_read"]
        found["a row of another dataset shard over http"] = 1e6 * remote["random_read"]
        found["TargetDataset(http://...) until its first batch"] = batch["first_batch"]
        found["memory of the service"] = peak_megabytes(process)
    return found


def measure(shards: int, folder: Path) -> Figures:
    """Everything at one size, in a new folder of `folder`, which is gone afterwards."""
    with tempfile.TemporaryDirectory(dir=folder, prefix="statsvc-scale-") as place:
        here = Path(place)
        write_tars(here / "tars", shards)
        write_plan(here)
        found = driver(here, shards) | readers(here) | served(here, shards)
        store = here / "store"
        found["files of the store"] = float(sum(len(names) for _, _, names in os.walk(store)))
        shutil.rmtree(store)
        return found


# In this order, with their units; those that do not depend on the size have no exponent to speak of.
UNITS = {
    "a run to its end": "s",
    "start until the first unit": "s",
    "driver, outside of units": "s",
    "driver, per unit it hands out": "us",
    "a unit": "ms",
    "memory of the driver": "MB",
    "after a kill, until its first unit": "s",
    "after a kill, until the end": "s",
    "statsvc run, nothing to do": "s",
    "its memory": "MB",
    "statsvc status": "s",
    "memory of status": "MB",
    "statsvc verify": "s",
    "memory of verify": "MB",
    "statsvc.open, teacher, targets": "s",
    "first read": "s",
    "a row of another dataset shard": "us",
    "rows()": "s",
    "TargetDataset until its first batch": "s",
    "memory of TargetDataset": "MB",
    "service until it listens": "s",
    "first /progress": "s",
    "counting again for /progress": "s",
    "first page of /shards": "s",
    "last page of /shards": "s",
    "/samples/{key}": "s",
    "/samples/{key}, again": "s",
    "statsvc.open(http://...)": "s",
    "its first read": "s",
    "a row of another dataset shard over http": "us",
    "TargetDataset(http://...) until its first batch": "s",
    "memory of the service": "MB",
    "files of the store": "",
}
GOALS = {
    "statsvc.open, teacher, targets": Goal(2, at_most=True, of="ours"),
    "statsvc run, nothing to do": Goal(10, at_most=True, of="ours"),
}


def tables(found: dict[int, Figures]) -> list[Table]:
    """A column for each size, and how the figure grows from the last but one to the last; then the goals."""
    sizes = sorted(found)
    header = ("what", *(f"{size:,} dataset shards" for size in sizes), "grows by")
    lines = [
        (name, *(_cell(found[size].get(name), unit) for size in sizes), _growth(name, unit, found))
        for name, unit in UNITS.items()
    ]
    note = (
        "Times grow with the number of dataset shards to the power in the last column: 0 is constant, 1 is linear. "
        f"Memory: so many bytes for each dataset shard. {IMAGES} images a dataset shard; store and tars lie in memory, "
        "one teacher that costs next to nothing, one process. The line `a unit` does not depend on the size: where it "
        "differs between columns, other work on the machine did too, and the powers are wrong by as much."
    )
    grid = Table("From a hundredth to all dataset shards", (), note, header, tuple(lines))
    of = max((size for size in sizes if size <= 10_000), default=sizes[0])
    goals = tuple(
        Row(f"{name}, {of:,} dataset shards", found[of][name], "s", goal=goal) for name, goal in GOALS.items()
    )
    return [grid, Table("Goals", goals)]


def _cell(value: float | None, unit: str) -> str:
    return "" if value is None else f"{number(value) if unit else f'{value:,.0f}'} {unit}".rstrip()


def _growth(name: str, unit: str, found: dict[int, Figures]) -> str:
    sizes = sorted(size for size in found if name in found[size])
    if len(sizes) < 2:
        return ""
    small, large = sizes[-2:]
    less, more = found[small][name], found[large][name]
    if unit == "MB":
        return f"{max(more - less, 0) * 1e6 / (large - small):,.0f} bytes each"
    return f"power {math.log(more / less) / math.log(large / small):.2f}" if less > 0 and more > 0 else ""


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shards", type=int, default=100_000)
    parser.add_argument("--sizes", type=int, default=3, help="how many: --shards, a tenth of it, a hundredth, ...")
    parser.add_argument("--folder", type=Path, default=Path("/dev/shm" if Path("/dev/shm").is_dir() else "/tmp"))
    parser.add_argument("--json", type=Path, help="where the record goes")
    parser.add_argument("--readme", type=Path, help="the file whose tables are replaced")
    parser.add_argument("--from", dest="record", type=Path, help="a record to take the figures from")
    chosen = parser.parse_args(arguments)
    try:
        if chosen.readme:  # before minutes are spent on figures that find no place
            replace_block(chosen.readme.read_text(), "", "scale")
    except (OSError, ValueError) as error:
        parser.error(f"{chosen.readme}: {error}")
    if chosen.record:
        about, sections = read_tables(chosen.record.read_text())
    else:
        found, parts = {}, [10**i for i in range(chosen.sizes)]
        for size in sorted({max(chosen.shards // part, 2 * LEFT) for part in parts}):
            begun = time.monotonic()
            found[size] = measure(size, chosen.folder)
            print(f"{size:,} dataset shards: {time.monotonic() - begun:.0f} s", flush=True)
        about, sections = environment(PACKAGES), {"scale": tables(found)}
    for table in sections["scale"]:
        print(terminal(table), flush=True)
    if chosen.json:
        write_record(chosen.json, about, sections)
    if chosen.readme:
        block = markdown(about, sections, "Measured in one run.")
        chosen.readme.write_text(replace_block(chosen.readme.read_text(), block, "scale"))
    missed = [each for table in sections["scale"] for each in table.missed()]
    print("\nevery goal was met" if not missed else "\ngoals missed:\n  " + "\n  ".join(missed))
    return 0


if __name__ == "__main__":
    sys.exit(main())
