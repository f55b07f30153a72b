"""What OpenAPI says of the service is what it does, for requests that schemathesis makes up.

STATSVC_SCHEMA_EXAMPLES=2000 makes that many requests for every operation. tests/api/schemathesis.toml has a
command line for that.
"""

from __future__ import annotations

import http.client
import json
import os
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import pytest

from api.routes import progress
from tests.support.finished import Finished
from tests.support.service import Running, always_counting, serving
from tests.support.transfers import connected

pytestmark = pytest.mark.slow

EXAMPLES = int(os.environ.get("STATSVC_SCHEMA_EXAMPLES", "15"))
CONFIG = Path(__file__).with_name("schemathesis.toml")
TOKEN = "t0ken"  # so that what happens without it is tried too


def schemathesis_run(running: Running, folder: Path, *options: str) -> subprocess.CompletedProcess[str]:
    """All checks in all phases: examples, edges of every parameter, random requests, and requests that follow links.

    /events has no end, for which schemathesis would wait; its own tests are below.
    """
    start = "from schemathesis.cli import schemathesis; schemathesis()"
    command = [sys.executable, "-c", start, "--config-file", str(CONFIG), "run", f"{running.url}/openapi.json"]
    command += ["--exclude-path", "/events", "--checks", "all", "--header", f"Authorization: Bearer {TOKEN}"]
    command += ["--seed", "20", "--request-timeout", "30", "--no-color", *options]
    return subprocess.run(command, capture_output=True, text=True, cwd=folder)


@pytest.mark.slow
def test_every_operation_does_what_its_schema_says(finished_once: Finished, tmp_path: Path) -> None:
    with serving(finished_once.path, token=TOKEN) as running:
        done = schemathesis_run(running, tmp_path, f"--max-examples={EXAMPLES}")
        assert done.returncode == 0, done.stdout[-20_000:] + done.stderr
        with connected(running) as client:
            text = client("/metrics", [("Authorization", f"Bearer {TOKEN}")]).body.decode()
    answered: Counter[int] = Counter()
    for status, count in re.findall(r'^statsvc_http_requests_total{.*status="(\d+)"} ([\d.e+]+)$', text, re.MULTILINE):
        answered[int(status)] += int(float(count))
    assert answered.total() > 500, answered
    assert answered[200] > answered.total() / 10, answered
    assert {206, 401, 404, 405, 412, 422} <= answered.keys(), answered
    assert max(answered) < 500


def test_every_operation_says_what_it_is_for_and_has_examples(service_once: Running) -> None:
    with connected(service_once) as client:
        document: Any = client.json("/openapi.json")
    for path, operation in ((path, item["get"]) for path, item in document["paths"].items()):
        assert set(document["paths"][path]) == {"get"}, "read only; HEAD of objects goes without saying"
        assert operation["summary"]
        assert operation["description"]
        for parameter in operation.get("parameters", ()):
            assert {"example", "examples"} & (parameter.keys() | parameter["schema"].keys()), (path, parameter["name"])
            assert parameter.get("description"), (path, parameter["name"])
        for status, response in operation["responses"].items():
            for media_type, content in response.get("content", {}).items():
                if media_type == "application/problem+json":
                    assert content["example"]["status"] == int(status)
                elif reference := content.get("schema", {}).get("$ref"):
                    model = document["components"]["schemas"][reference.rpartition("/")[2]]
                    assert "examples" in json.dumps(model["properties"]) or "$ref" in json.dumps(model), reference


def test_an_answer_that_breaks_the_schema_is_found(finished_once: Finished, tmp_path: Path) -> None:
    with serving(finished_once.path, token=TOKEN) as running:
        app: Any = running.server.config.app
        app.openapi()["components"]["schemas"]["Health"]["properties"]["status"] = {"type": "integer"}
        done = schemathesis_run(running, tmp_path, "--max-examples=1", "--phases=coverage", "--include-path=/readyz")
    assert done.returncode == 1
    assert "is not of type" in done.stdout


# --- /events ---


@contextmanager
def events(running: Running) -> Iterator[Callable[[], dict[str, Any] | None]]:
    """Gives what the next `progress` holds; None at the end of the stream."""
    connection = http.client.HTTPConnection("127.0.0.1", running.port, timeout=30)
    connection.request("GET", "/events", headers={"Accept": "text/event-stream"})
    with closing(connection), connection.getresponse() as response:
        assert response.status == 200
        assert (response.getheader("content-type") or "").startswith("text/event-stream")

        def following() -> dict[str, Any] | None:
            fields: dict[str, str] = {}
            while line := response.readline().decode():
                name, _, value = line.rstrip("\n").partition(": ")
                if not name and fields:
                    assert fields["event"] == "progress"
                    found: dict[str, Any] = json.loads(fields["data"])
                    return found
                fields[name] = value
            return None

        yield following


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """A service that looks more often."""
    monkeypatch.setattr(progress, "LOOK_SECONDS", 0.05)
    always_counting(monkeypatch)


@pytest.mark.usefixtures("impatient")
def test_the_first_event_comes_at_once_and_is_the_progress(service: Running) -> None:
    with events(service) as following, connected(service) as client:
        first, asked = following(), client.json("/progress")
    assert first is not None
    assert (first["state"], first["teachers"]) == ("finished", asked["teachers"])


@pytest.mark.usefixtures("impatient")
def test_events_tell_of_a_store_that_appears_and_of_every_commit_and_end_with_the_service(damageable: Finished) -> None:
    elsewhere = damageable.path.with_name("elsewhere")
    commit = next(damageable.path.glob(".statsvc/commits/cache/dino/*/000002.json"))
    content = commit.read_bytes()
    commit.unlink()
    with serving(elsewhere) as running, events(running) as following:
        told: list[tuple[str, int]] = []

        def until(state: str, shards: int) -> None:
            while (state, shards) not in told:
                now = following()
                assert now is not None, told
                cached = now["teachers"].get("dino", {}).get("cached", {})
                told.append((now["state"], sum(of_set["dataset_shards"] for of_set in cached.values())))

        until("waiting", 0)
        damageable.path.rename(elsewhere)
        until("stopped", 2)
        (elsewhere / commit.relative_to(damageable.path)).write_bytes(content)
        until("finished", 3)
        running.server.should_exit = True
        while following() is not None:
            continue


@pytest.mark.usefixtures("impatient")
def test_a_silent_run_is_told_of_again_so_that_proxies_keep_the_connection(
    service: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress, "REPEAT_SECONDS", 0.1)
    with events(service) as following:
        first = following()
        assert first is not None
        assert first == following() == following()
