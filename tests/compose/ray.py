"""docker/compose.ray-head.yml and compose.ray-worker.yml on one machine: two nodes, and the bytes of one worker."""

from __future__ import annotations

import json
import os
import secrets
from functools import partial
from pathlib import Path

import yaml

from tests import ROOT
from tests.compose.containers import Containers, expect, step, torn_down, wait_for
from tests.support.ray_cluster import HEAD
from workers.engines.resources import cores

CONTENTS = """
import hashlib, json, pathlib
store = pathlib.Path("/store")
files = (path for path in store.rglob("*") if path.is_file() and path.name != "run.json")  # which names the engine
print(json.dumps({str(path.relative_to(store)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}))
"""


def run(alone: Containers, folder: Path, settings: dict[str, str]) -> None:
    """The plan of the settings on two nodes. alone: their api is up, their worker did the same plan to its end."""
    settings = {**settings, **_ray_settings(folder, settings)}
    head, node = (Containers(ROOT / f"docker/compose.ray-{name}.yml", settings) for name in ("head", "worker"))
    with torn_down(head, node):
        with step("image with Ray built; a node, which waits for its head, and the head"):
            node.compose("up", "--build", "--detach")
            head.compose("up", "--detach", "worker")
        with step("both nodes work, and the driver ends with 0"):
            for name, service, containers in (("head", "worker", head), ("other node", "cpu", node)):
                wait_for(f"a unit on the {name}", 180, partial(containers.processes, service, "Actor.do"))
            wait_for("the end of the driver", 300, lambda: head.has_ended("worker"))
            state = head.inspect("worker")
            expect(state["State"]["ExitCode"] == 0, f"the driver ended with {state['State']['ExitCode']}")
            expect(state["RestartCount"] == 0, "the driver was started again")
        with step("every byte of the store is as one worker has it"):
            expected = json.loads(alone.execute("api", "python", "-c", CONTENTS))
            found = json.loads(head.run("python", "-c", CONTENTS))
            differing = [name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name)]
            expect(not differing, f"{len(differing)} of {len(expected)} files differ: {sorted(differing)[:5]}")
            print(f"  {len(expected)} files are the same")
            report = head.run("statsvc", "verify", "--store", "/store", "--json")
            expect(json.loads(report)["damaged"] == [], f"damaged: {report}")


def _ray_settings(folder: Path, settings: dict[str, str]) -> dict[str, str]:
    """A folder as store, a token, and the plan for Ray."""
    store, token, plan = folder / "ray-store", folder / "ray-token", folder / "ray-plan.yaml"
    store.mkdir()
    token.touch(0o600)
    token.write_text(secrets.token_hex(32))
    for path in (store, token):
        os.chown(path, int(settings["STATSVC_UID"]), int(settings["STATSVC_GID"]))
    document = yaml.safe_load(Path(settings["STATSVC_PLAN"]).read_text())
    # As many threads as the one worker has: their number decides about last digits.
    document["engine"] = {"kind": "ray", "address": "auto", "cpus_per_worker": cores()}
    plan.write_text(yaml.safe_dump(document))
    plan.chmod(0o644)
    return {
        "STATSVC_PLAN": str(plan), "STATSVC_STORE": str(store), "STATSVC_EXTRAS": "", "STATSVC_RAY_STORE": "",
        "STATSVC_RAY_HEAD": HEAD, "STATSVC_RAY_TOKEN": str(token), "COMPOSE_PROFILES": "cpu",
    }  # fmt: skip
