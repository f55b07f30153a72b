"""Zarr clients that were written without us read the same numbers over HTTP as from disk."""

from __future__ import annotations

import base64
import json
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorstore
import zarr
from obstore.store import HTTPStore
from zarr.storage import FsspecStore, ObjectStore

from tests.support.damage import damage
from tests.support.finished import ABSENT, ROWS_PER_SHARD, Finished
from tests.support.service import Running, serving
from tests.support.transfers import connected

ZARRITA = Path(__file__).parent / "zarrita"
INSTALL_SECONDS, READ_SECONDS = 120, 60

Wanted = list[tuple[str, int, int]]  # array and its first and last row, as a slice
Reader = Callable[[str, dict[str, str], Wanted], list[np.ndarray]]


def read_with_zarr(store: Any, wanted: Wanted) -> list[np.ndarray]:
    group: Any = zarr.open_group(store, mode="r")
    return [np.asarray(group[path][begin:end]) for path, begin, end in wanted]


def zarr_through_fsspec(url: str, headers: dict[str, str], wanted: Wanted) -> list[np.ndarray]:
    options = {"client_kwargs": {"headers": headers}}
    return read_with_zarr(FsspecStore.from_url(url, storage_options=options, read_only=True), wanted)


def zarr_through_obstore(url: str, headers: dict[str, str], wanted: Wanted) -> list[np.ndarray]:
    store = HTTPStore.from_url(url, client_options={"allow_http": True, "default_headers": headers})
    return read_with_zarr(ObjectStore(store, read_only=True), wanted)


def tensorstore_zarr3(url: str, headers: dict[str, str], wanted: Wanted) -> list[np.ndarray]:
    lines = [f"{name}: {value}" for name, value in headers.items()]
    context = tensorstore.Context({"cache_pool": {"total_bytes_limit": 0}})
    found = []
    for path, begin, end in wanted:
        storage = {"driver": "http", "base_url": f"{url}/{path}/", "headers": lines}
        array = tensorstore.open({"driver": "zarr3", "kvstore": storage}, open=True, context=context).result()
        found.append(np.asarray(array[begin:end].read().result()))
    return found


def zarrita_in_node(url: str, headers: dict[str, str], wanted: Wanted) -> list[np.ndarray]:
    request = json.dumps({"url": url, "headers": headers, "wanted": wanted})
    done = subprocess.run(
        ["node", "read.mjs"], cwd=ZARRITA, input=request, capture_output=True, text=True, timeout=READ_SECONDS
    )
    assert done.returncode == 0, done.stderr
    return [
        np.frombuffer(base64.b64decode(each["bytes"]), np.dtype(each["dtype"])).reshape(each["shape"])
        for each in json.loads(done.stdout)
    ]


@pytest.fixture(scope="session")
def node() -> None:
    """zarrita, as the lock file has it; skips where it cannot be had."""
    for tool in ("node", "npm"):
        if shutil.which(tool) is None:
            pytest.skip(f"zarrita.js was not tried: no {tool} here")
    locked = json.loads((ZARRITA / "package-lock.json").read_text())["packages"]["node_modules/zarrita"]["version"]
    installed = ZARRITA / "node_modules/zarrita/package.json"
    if installed.is_file() and json.loads(installed.read_text())["version"] == locked:
        return
    command = ["npm", "ci", "--no-audit", "--no-fund", "--ignore-scripts", "--fetch-retries=1"]
    try:
        done = subprocess.run(command, cwd=ZARRITA, capture_output=True, text=True, timeout=INSTALL_SECONDS)
    except subprocess.TimeoutExpired:
        pytest.skip("zarrita.js was not tried: npm ci had no answer from its registry")
    if done.returncode:
        assert "EUSAGE" not in done.stderr, "package.json and package-lock.json do not belong together"
        assert "EINTEGRITY" not in done.stderr, "the registry has other bytes than package-lock.json"
        code = re.search(r"npm (?:error|ERR!) code (\w+)", done.stderr)
        pytest.skip(
            f"zarrita.js was not tried: npm ci cannot reach a registry: {code[1] if code else done.stderr[:200]}"
        )


CLIENTS: dict[str, Reader] = {
    "zarr-fsspec": zarr_through_fsspec,
    "zarr-obstore": zarr_through_obstore,
    "tensorstore": tensorstore_zarr3,
    "zarrita": zarrita_in_node,
}


@pytest.fixture(params=CLIENTS)
def read(request: pytest.FixtureRequest) -> Reader:
    """A client: from the URL of a hierarchy, headers and rows of arrays to those rows."""
    if request.param == "zarrita":
        request.getfixturevalue("node")
    return CLIENTS[request.param]


def arrays(store: Path) -> list[str]:
    """Paths of all arrays."""
    documents = [
        file for file in sorted(store.rglob("zarr.json")) if json.loads(file.read_bytes())["node_type"] == "array"
    ]
    return [str(file.parent.relative_to(store)) for file in documents]


def from_disk(store: Path, wanted: Wanted) -> list[np.ndarray]:
    return read_with_zarr(store, wanted)


def codes_of(finished: Finished) -> str:
    return f"teachers/dino/cache/{finished.cache_set()}/patches/codes"


def served_in_parts(running: Running) -> float:
    """How many parts of objects the service has sent."""
    with connected(running) as client:
        lines = client("/metrics").body.decode().splitlines()
    mine = 'statsvc_http_requests_total{method="GET",route="/zarr/{path:path}",status="206"}'
    return sum(float(line.rpartition(" ")[2]) for line in lines if line.startswith(mine))


def test_every_number_of_every_array_is_that_on_disk(read: Reader, service_once: Running) -> None:
    store = service_once.store_path
    paths = arrays(store)
    kinds = {path.rpartition("/")[2] for path in paths}
    assert kinds == {"key_hash", "status", "views", "count", "images", "mean", "scatter", "codes", "scales",
                     "target_mean", "target_var"}  # fmt: skip
    wanted = [(path, 0, json.loads((store / path / "zarr.json").read_bytes())["shape"][0]) for path in paths]
    assert {end for _, _, end in wanted} == {3, 3 * ROWS_PER_SHARD}
    for (path, *_), there, here in zip(
        wanted, read(f"{service_once.url}/zarr", {}, wanted), from_disk(store, wanted), strict=True
    ):
        assert there.dtype == here.dtype, path
        np.testing.assert_array_equal(there, here, path)


def test_single_rows_of_a_shard_come_by_ranges_and_absent_ones_are_the_fill_value(
    read: Reader, service_once: Running, finished_once: Finished
) -> None:
    codes = codes_of(finished_once)
    wanted = [(codes, row, row + 1) for row in range(3 * ROWS_PER_SHARD)]
    before = served_in_parts(service_once)
    found = read(f"{service_once.url}/zarr", {}, wanted)
    assert served_in_parts(service_once) - before >= 3 * ROWS_PER_SHARD - len(ABSENT)
    for row, (there, here) in enumerate(zip(found, from_disk(service_once.store_path, wanted), strict=True)):
        np.testing.assert_array_equal(there, here, f"row {row}")
        assert there.any() == (row not in ABSENT)
    scales = read(
        f"{service_once.url}/zarr", {}, [(codes.replace("/codes", "/scales"), row, row + 1) for row in ABSENT]
    )
    assert all(np.isnan(scale_1T).all() for scale_1T in scales)


def test_rows_across_shards_come_together(read: Reader, service_once: Running, finished_once: Finished) -> None:
    wanted = [(codes_of(finished_once), 3, 17), ("samples/key_hash", 6, 8), ("teachers/siglip/status", 20, 21)]
    for there, here in zip(
        read(f"{service_once.url}/zarr", {}, wanted), from_disk(service_once.store_path, wanted), strict=True
    ):
        np.testing.assert_array_equal(there, here)


def test_a_dataset_shard_without_its_commit_reads_as_absent(
    read: Reader, service: Running, damageable: Finished
) -> None:
    for commit in damageable.path.glob(".statsvc/commits/cache/*/*/000001.json"):
        commit.unlink()
    codes = codes_of(damageable)
    wanted: Wanted = [(codes, 0, 21), (codes.replace("/codes", "/target_var"), 0, 3), ("samples/status", 0, 21)]
    found = read(f"{service.url}/zarr", {}, wanted)
    for (path, *_), there, here in zip(wanted, found, from_disk(damageable.path, wanted), strict=True):
        rows = slice(7, 14) if len(here) == 21 else slice(1, 2)
        assert here[rows].any(), "it lies on disk"
        absent = np.isnan(there[rows]) if there.dtype.kind == "f" else there[rows] == 0
        assert absent.all(), path
        np.testing.assert_array_equal(np.delete(there, rows, 0), np.delete(here, rows, 0))


def test_a_damaged_shard_is_an_error_and_never_reads_as_absent(
    read: Reader, service: Running, damageable: Finished
) -> None:
    codes = codes_of(damageable)
    file = damageable.path / codes / "c/1/0/0"
    damage(file, lambda data: data[:-1])
    with pytest.raises(Exception, match=r"409|Conflict|already exists"):
        read(f"{service.url}/zarr", {}, [(codes, 7, 14)])
    file.unlink()
    with pytest.raises(Exception, match=r"409|Conflict|already exists"):
        read(f"{service.url}/zarr", {}, [(codes, 7, 8)])


def test_a_token_travels_with_every_request(read: Reader, finished_once: Finished) -> None:
    wanted: Wanted = [("samples/status", 0, 21), (codes_of(finished_once), 2, 3)]
    with serving(finished_once.path, token="open-sesame") as running:
        found = read(f"{running.url}/zarr", {"Authorization": "Bearer open-sesame"}, wanted)
    for there, here in zip(found, from_disk(finished_once.path, wanted), strict=True):
        np.testing.assert_array_equal(there, here)


def test_the_lock_file_names_no_host() -> None:
    packages = json.loads((ZARRITA / "package-lock.json").read_text())["packages"]
    assert packages.pop("")["dependencies"] == {"zarrita": packages["node_modules/zarrita"]["version"]}
    assert all(package["integrity"] for package in packages.values())
    assert not any(package.get("resolved") for package in packages.values())
