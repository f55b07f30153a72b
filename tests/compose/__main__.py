"""`make compose-test`: docker/compose.cpu.yml for real, from nothing, with processes killed under it; then Ray's files.

COMPOSE=docker-compose chooses the older program. Images are built and stay, as a cache of the next build; containers,
networks and volumes are gone at the end.
"""

from __future__ import annotations

import io
import json
import os
import signal
import sys
import tempfile
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np

from tests import ROOT
from tests.compose import inputs, ray
from tests.compose.containers import (
    NO_SETTINGS,
    Containers,
    Failed,
    docker,
    expect,
    is_usable,
    step,
    torn_down,
    wait_for,
)

BASE, API_BYTES = "python:3.11-slim-bookworm", 250_000_000
TEACHER = "dino"


def main() -> int:
    if not is_usable():
        print("compose-test needs a running docker that this user may use", file=sys.stderr)
        return 1
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that everything is torn down then too
    with tempfile.TemporaryDirectory(prefix="statsvc-compose-") as name:
        folder = Path(name)
        with step(f"{inputs.SHARDS * inputs.IMAGES} photographs and a model"):
            plan = inputs.write(folder, ROOT / "docker/plans/demo.yaml")
        # As ourselves, so that we may kill; not as root, which the images are made to do without.
        uid, gid = (os.getuid(), os.getgid()) if os.getuid() else (1000, 1000)
        settings = {
            "STATSVC_PLAN": str(plan), "STATSVC_DATA": str(folder / "data"), "STATSVC_STORE": "store",
            "STATSVC_HF_CACHE": "huggingface", "STATSVC_UID": str(uid), "STATSVC_GID": str(gid), "STATSVC_TOKEN": "",
        }  # fmt: skip
        containers = Containers(ROOT / "docker/compose.cpu.yml", settings)
        try:
            with torn_down(containers):
                run(containers, folder)
                ray.run(containers, folder, settings)
        except (Failed, AssertionError) as error:
            print(f"FAILED: {error}", file=sys.stderr, flush=True)
            return 1
    print("compose-test passed")
    return 0


def run(containers: Containers, folder: Path) -> None:
    with step("images built, containers started"):
        containers.compose("up", "--build", "--detach")
    with step("the api answers"):
        wait_for("/healthz", 60, lambda: containers.get("/healthz"))
    check_images(containers)
    recover_from_kills(containers)
    with step("the worker ends with 0"):
        wait_for("the end of the worker", 300, lambda: containers.has_ended("worker"))
        state = containers.inspect("worker")
        expect(state["State"]["ExitCode"] == 0, f"the worker ended with {state['State']['ExitCode']}")
        expect(state["RestartCount"] == 1, f"the worker was started again {state['RestartCount']} times, not once")
    with step("every row is served, one shard is the volume's, one row is a fresh forward pass"):
        compare_a_shard(containers)
        compare_a_row(containers, folder)
        health = containers.inspect("api")["State"]["Health"]["Status"]
        expect(health == "healthy", f"the api answers and is {health} to docker")
    with step("the store verifies"):
        report = containers.run("statsvc", "verify", "--store", "/store", "--json")
        expect(json.loads(report)["damaged"] == [], f"damaged: {report}")
    expect(containers.inspect("worker")["RestartCount"] == 1, "the worker was started again after its success")
    with step("without settings the demo plan finds its photographs"):
        command = ["statsvc", "run", "/plan.yaml", "--store", "/tmp/store", "--dry-run"]
        printed = containers.run(*command, environment=NO_SETTINGS)
        expect("loud: 6 dataset shards, 96 rows" in printed, f"not the plan of 96 photographs: {printed}")


def check_images(containers: Containers) -> None:
    """Neither image runs as root or writes to its own files; the api is slim."""
    with step("the api is slim; both are read-only and nobody's root"):
        added = image_bytes(containers.inspect("api")["Image"]) - image_bytes(BASE)
        print(f"  the api adds {added / 1e6:.0f} MB to {BASE}")
        expect(added < API_BYTES, f"the api adds {added} bytes to its base; {API_BYTES} are allowed")
        probe = (
            "import importlib.util, os, pathlib\n"
            "for folder in ('/', '/usr/local', '/src'):\n"
            "    try: pathlib.Path(folder, 'probe').touch()\n"
            "    except OSError: continue\n"
            "    raise SystemExit(f'{folder} can be written')\n"
            "pathlib.Path('/tmp/probe').touch()\n"
            "print(os.getuid(), bool(importlib.util.find_spec('torch')))"
        )
        for service, torch in (("api", "False"), ("worker", "True")):
            uid, found = containers.execute(service, "python", "-c", probe).decode().split()
            expect(uid != "0" and found == torch, f"{service} runs as {uid}, torch installed: {found}")


def recover_from_kills(containers: Containers) -> None:
    """A process inside the worker, the worker and the api die; each comes back, and nobody else notices."""
    with step("a killed process of the worker's is replaced by the worker"):
        wait_for("a measured dataset shard", 120, lambda: card(containers).get("measured_dataset_shards"))
        containers.kill("worker", "spawn_main")
        before = len(cached(containers))
        wait_for("a cached dataset shard", 180, lambda: len(cached(containers)) > before)
        expect(containers.inspect("worker")["RestartCount"] == 0, "the whole container was started again")
    with step("the killed worker is started again and goes on"):
        done = cached(containers)
        expect(0 < len(done) < inputs.SHARDS, f"{len(done)} of {inputs.SHARDS} cached: no middle to kill it in")
        containers.kill("worker")
        wait_for("the restart", 30, lambda: containers.inspect("worker")["RestartCount"] == 1)
        expect(containers.get("/healthz") is not None, "the api does not answer without a worker")
    with step("the killed api comes back"):
        containers.kill("api")
        wait_for("the restart", 30, lambda: containers.inspect("api")["RestartCount"] == 1)
        wait_for("/healthz", 60, lambda: containers.get("/healthz"))
        wait_for("what was cached before", 30, lambda: {s["shard"] for s in done} <= {
            s["shard"] for s in cached(containers)
        })  # fmt: skip
        print(f"  progress: {json.dumps(containers.get_json('/progress'))[:200]}")


def compare_a_shard(containers: Containers) -> None:
    listing = containers.get_json(f"/teachers/{TEACHER}/shards?array=patches/codes")
    expect(sum(s["rows"] for s in listing["shards"]) == inputs.SHARDS * inputs.IMAGES, f"rows are missing: {listing}")
    listed = listing["shards"][-1]
    served = containers.get(f"/teachers/{TEACHER}/shards/{listed['shard']}?array=patches/codes")
    path = f"/store/teachers/{TEACHER}/cache/{listing['set']}/patches/codes/c/{listed['shard']}/0/0"
    stored = containers.execute("api", "cat", path)
    expect(served == stored, f"{path} is served with other bytes")
    expect(len(stored) == listed["bytes"], f"{path} has {len(stored)} bytes, {listed['bytes']} are listed")
    crc = f"{google_crc32c.value(stored):08x}"
    expect(crc == listed["crc32c"], f"{path} has crc32c {crc}, {listed['crc32c']} is listed")
    print(f"  {len(stored)} bytes of {path} are the same")


def compare_a_row(containers: Containers, folder: Path) -> None:
    shard, position = inputs.SHARDS - 2, 5
    row = shard * containers.get_json("/teachers")["rows_per_shard"] + position
    body = containers.get(f"/teachers/{TEACHER}/targets?rows={row}&output=patches")
    artifact = containers.get(f"/teachers/{TEACHER}/phis?output=patches&format=safetensors")
    assert body is not None
    assert artifact is not None
    decoded_Tk = np.load(io.BytesIO(body))[0]
    # The largest code of a token is 127, and a code is off by half of a step at most.
    half_step_T1 = np.abs(decoded_Tk).max(axis=1, keepdims=True) / 127 / 2
    excess = {}
    for other in (position, position + 1):
        target_Tk, noise_Tk = inputs.fresh_target(folder, shard, other, artifact)
        excess[other] = (np.abs(decoded_Tk - target_Tk) / (half_step_T1 + noise_Tk)).max()
    print(f"  row {row}: {excess[position]:.3f} of the error allowed; the next photograph: {excess[position + 1]:.0f}")
    expect(excess[position] <= 1, f"row {row} is not what the teacher says")
    expect(excess[position + 1] > 10, "another photograph would have passed too")


def card(containers: Containers) -> dict[str, Any]:
    return containers.get_json(f"/teachers/{TEACHER}") or {}


def cached(containers: Containers) -> list[dict[str, Any]]:
    """The feature shards that are listed."""
    listing = containers.get_json(f"/teachers/{TEACHER}/shards?array=patches/codes")
    return listing["shards"] if listing else []


def image_bytes(image: str) -> int:
    return int(docker("image", "inspect", "--format", "{{.Size}}", image))


if __name__ == "__main__":
    sys.exit(main())
