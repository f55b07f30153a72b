"""Workers on real Ray clusters: the bytes are those of the inline engine, whatever joins, leaves or dies."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from statsvc.errors import EngineError, PlanError
from statsvc.plan import Teacher
from tests.support.commands import COMMAND
from tests.support.plans import plan_document, write_plan
from tests.support.ray_cluster import HEAD, RayCluster
from tests.support.tiny import photographs, plain_image, write_tar
from tests.workers.driver.test_run import contents
from workers.engines.ray.actor import Actor
from workers.engines.ray.cluster import Cluster
from workers.engines.ray.nodes import check_same
from workers.teachers import resolve
from workers.unit.job import Unit
from workers.unit.worker import Failed, Ready, WorkerSetup

pytestmark = pytest.mark.slow

SECOND, THIRD = "127.0.0.3", "127.0.0.4"
SHARDS = 12
TIMEOUT = 120
# What a test asks of a teacher without changing its fingerprint: files where the run was started.
TEACHER = """
import os, signal, time
from pathlib import Path
import torch

def build():
    mix = torch.randn(3 * 8 * 8, 24, generator=torch.Generator().manual_seed(0))
    def teacher(pixels_B3SS):
        if Path("delay").exists():
            time.sleep(float(Path("delay").read_text()))
        if Path("poison").exists() and (pixels_B3SS.flatten(2).std(2) == 0).any() and len(pixels_B3SS) > 1:
            os.kill(os.getpid(), signal.SIGKILL)
        cells = torch.nn.functional.unfold(pixels_B3SS, 8, stride=8).transpose(1, 2)
        return {"patches": torch.sin(cells @ mix)}
    return teacher
"""
PYTHON = {"source": "python", "model": "slowly:build", "size": 32, "interpolation": "bilinear",
          "mean": [0.5, 0.5, 0.5], "std": [0.2, 0.2, 0.2]}  # fmt: skip


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Dataset shards of 6 photographs; one of the fifth has a single colour."""
    folder = tmp_path_factory.mktemp("dataset")
    for shard in range(SHARDS):
        members = photographs(*(f"{shard}-{number}" for number in range(6)))
        if shard == 5:
            members[2] = ("plain.png", plain_image((7, 7, 7)))
        write_tar(folder / f"photos-{shard:02d}.tar", members)
    return folder


@pytest.fixture(scope="module")
def cluster() -> Iterator[RayCluster]:
    """Begins as one node; which of these tests have run decides what it is later, and none of them minds."""
    with RayCluster() as started:
        yield started


@pytest.fixture
def workspace(tmp_path: Path, dataset: Path) -> Path:
    (tmp_path / "slowly.py").write_text(TEACHER)
    (tmp_path / "photos").symlink_to(dataset)
    return tmp_path


@pytest.fixture(scope="module")
def inline(tmp_path_factory: pytest.TempPathFactory, dataset: Path) -> dict[str, bytes]:
    """What the inline engine stores, with one torch thread."""
    folder = tmp_path_factory.mktemp("inline")
    (folder / "slowly.py").write_text(TEACHER)
    (folder / "photos").symlink_to(dataset)
    finished = run(folder, {"kind": "inline"})
    assert finished.returncode == 0, finished.stderr
    return contents(folder / "store")


def plan_of(folder: Path, engine: dict[str, Any], **changes: Any) -> Path:
    """Paths of the plan are relative: they begin where the driver was started, also on other nodes."""
    engine = {"batch_size": 3, "decoders": 1, "cpus_per_worker": 1, **engine}
    data = {"shards": "photos/*.tar"}
    return write_plan(
        folder,
        plan_document(
            folder, **{"store": "store", "data": data, "teachers": {"dino": PYTHON}, "engine": engine, **changes}
        ),
    )


def run(
    folder: Path, engine: dict[str, Any], environment: dict[str, str] | None = None, **changes: Any
) -> subprocess.CompletedProcess[str]:
    command = [*COMMAND, "-v", "run", str(plan_of(folder, engine, **changes))]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=TIMEOUT)


class Driver:
    """A run in the background, in a process group of its own, which does not outlive its block."""

    def __init__(self, folder: Path, engine: dict[str, Any], environment: dict[str, str] | None = None) -> None:
        self._log = folder / "log"
        with self._log.open("wb") as log:
            self.process = subprocess.Popen(
                [*COMMAND, "-v", "run", str(plan_of(folder, engine))], cwd=folder, env=environment, stdout=log,
                stderr=subprocess.STDOUT, start_new_session=True,
            )  # fmt: skip

    def __enter__(self) -> Driver:
        return self

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()

    @property
    def said(self) -> str:
        return self._log.read_text()

    def wait_until(self, condition: Callable[[], Any]) -> None:
        deadline = time.monotonic() + TIMEOUT
        while not condition():
            assert self.process.poll() is None, self.said
            assert time.monotonic() < deadline, self.said
            time.sleep(0.02)

    def wait(self) -> int:
        return self.process.wait(TIMEOUT)

    def done_on(self, node: str) -> int:
        return len(re.findall(rf"is done \(on node {re.escape(node)}\)", self.said))

    def workers(self) -> list[int]:
        return [int(pid) for pid in re.findall(r"place on node \S+: process (\d+)", self.said)]


def joined(cluster: RayCluster) -> dict[str, Any]:
    return {"kind": "ray", "address": cluster.address}


class TestOneClusterFromOneNodeToTwo:
    def test_one_worker_stores_the_bytes_of_the_inline_engine(
        self, cluster: RayCluster, workspace: Path, inline: dict[str, bytes]
    ) -> None:
        environment = {**cluster.environment, "RAY_ADDRESS": cluster.address}
        finished = run(workspace, {"kind": "ray", "address": "auto"}, environment)
        assert finished.returncode == 0, finished.stderr
        assert contents(workspace / "store") == inline
        assert "raylet" not in finished.stdout + finished.stderr

    def test_a_worker_killed_in_the_middle_of_a_unit_is_replaced_and_nothing_differs(
        self, cluster: RayCluster, workspace: Path, inline: dict[str, bytes]
    ) -> None:
        (workspace / "delay").write_text("0.3")
        with Driver(workspace, joined(cluster), cluster.environment) as driver:
            driver.wait_until(lambda: driver.done_on(HEAD) >= 2)
            os.kill(driver.workers()[-1], signal.SIGKILL)
            driver.wait_until(lambda: "failed: the worker process on node" in driver.said)
            (workspace / "delay").unlink()
            assert driver.wait() == 0, driver.said
            assert len(driver.workers()) == 2
        assert contents(workspace / "store") == inline

    def test_a_unit_that_kills_its_worker_every_time_is_quarantined_and_the_rest_is_done(
        self, cluster: RayCluster, workspace: Path
    ) -> None:
        (workspace / "poison").touch()
        finished = run(workspace, joined(cluster), cluster.environment)
        assert finished.returncode == 1, finished.stderr
        assert "photos-05.tar is quarantined in the measure phase: the worker process on node" in finished.stdout
        cached = list((workspace / "store").glob(".statsvc/commits/cache/dino/*/*.json"))
        assert len(cached) == SHARDS - 1

    def test_a_node_that_joins_later_gets_work(
        self, cluster: RayCluster, workspace: Path, inline: dict[str, bytes]
    ) -> None:
        (workspace / "delay").write_text("0.3")
        with Driver(workspace, joined(cluster), cluster.environment) as driver:
            driver.wait_until(lambda: driver.done_on(HEAD))
            cluster.add(SECOND)
            driver.wait_until(lambda: driver.done_on(SECOND))
            (workspace / "delay").unlink()
            assert driver.wait() == 0, driver.said
        assert contents(workspace / "store") == inline

    def test_a_node_killed_in_the_middle_of_a_run_leaves_the_bytes_as_they_are(
        self, cluster: RayCluster, workspace: Path, inline: dict[str, bytes]
    ) -> None:
        (workspace / "delay").write_text("0.3")
        with Driver(workspace, joined(cluster), cluster.environment) as driver:
            driver.wait_until(lambda: driver.done_on(HEAD) and driver.done_on(SECOND))
            cluster.kill(SECOND)
            driver.wait_until(lambda: "failed: " in driver.said)
            (workspace / "delay").unlink()
            assert driver.wait() == 0, driver.said
        assert contents(workspace / "store") == inline


def test_a_cluster_whose_head_is_gone_ends_the_run_with_a_sentence(workspace: Path, inline: dict[str, bytes]) -> None:
    (workspace / "delay").write_text("0.3")
    with RayCluster() as cluster, Driver(workspace, joined(cluster), cluster.environment) as driver:
        driver.wait_until(lambda: driver.done_on(HEAD))
        cluster.kill(HEAD)
        assert driver.wait() == 3, driver.said
        assert f"error: the head of the Ray cluster at {cluster.address} is gone" in driver.said
        assert "Traceback" not in driver.said.partition("error: ")[2]
    (workspace / "delay").unlink()
    assert run(workspace, {"kind": "inline"}).returncode == 0
    assert contents(workspace / "store") == inline


def offspring(process: subprocess.Popen[bytes]) -> list[psutil.Process]:
    return psutil.Process(process.pid).children(recursive=True)


def computing(processes: list[psutil.Process]) -> list[psutil.Process]:
    """Those that live, less Ray's agents: they take a minute to see that their cluster is gone."""
    return [process for process in psutil.wait_procs(processes, timeout=30)[1] if not process.name().endswith("Agent")]


class TestAClusterOfItsOwn:
    def test_interrupted_then_killed_then_finished_it_stores_the_same_bytes_and_leaves_nothing_behind(
        self, workspace: Path, inline: dict[str, bytes]
    ) -> None:
        (workspace / "delay").write_text("0.3")
        with Driver(workspace, {"kind": "ray"}) as driver:
            driver.wait_until(lambda: "is done" in driver.said)
            before = driver.said.count("is done")
            os.killpg(driver.process.pid, signal.SIGINT)  # a terminal tells everybody
            assert driver.wait() == 130, driver.said
            assert driver.said.count("is done") > before
            assert "failed" not in driver.said
            assert "Traceback" not in driver.said
        with Driver(workspace, {"kind": "ray"}) as driver:
            done = len(list((workspace / "store").glob(".statsvc/commits/measure/dino/*.json")))
            driver.wait_until(lambda: "is done" in driver.said)
            everything = offspring(driver.process)
            assert len(everything) > 5  # Ray's own, workers, decoders
            driver.process.kill()
            assert not computing(everything)
        with Driver(workspace, {"kind": "ray"}) as driver:
            driver.wait_until(lambda: len(driver.workers()) >= min(2, os.cpu_count() or 1))
            everything = offspring(driver.process)
            (workspace / "delay").unlink()
            assert driver.wait() == 0, driver.said
            assert driver.said.count("measure of") <= SHARDS - done
            assert not computing(everything)
            # Also those of the driver that was killed.
            assert not list(Path(tempfile.gettempdir()).glob("statsvc-ray-*"))
        assert contents(workspace / "store") == inline


class TestRefusals:
    """Before anything is written."""

    @pytest.mark.parametrize(
        ("engine", "code", "words"),
        [
            ({"cpus_per_worker": 64}, 2, ("room", "64 CPU", "127.0.0.2 has 1 CPU", "cpus_per_worker")),
            ({"gpus": 2}, 2, ("engine.gpus: 2", "has none")),
            ({"address": "127.0.0.2:1"}, 3, ("no Ray cluster answers at 127.0.0.2:1", "ray start --head", "local")),
        ],
        ids=["no node has room", "no node has a GPU", "no cluster answers"],
    )
    def test_say_what_is_wanted_what_is_there_and_what_to_do(
        self, cluster: RayCluster, workspace: Path, engine: dict[str, Any], code: int, words: tuple[str, ...]
    ) -> None:
        refused = run(workspace, {**joined(cluster), **engine}, cluster.environment)
        assert refused.returncode == code, refused.stderr
        assert all(word in refused.stderr for word in words), refused.stderr
        assert "Traceback" not in refused.stderr
        assert not (workspace / "store").exists()

    def test_a_node_with_another_version_of_statsvc(self, cluster: RayCluster, workspace: Path) -> None:
        other = workspace / "other" / "statsvc-99.0.dist-info"
        other.mkdir(parents=True)
        (other / "METADATA").write_text("Metadata-Version: 2.1\nName: statsvc\nVersion: 99.0\n")
        with cluster.node(THIRD, PYTHONPATH=str(other.parent)):
            (workspace / "delay").write_text("0.3")
            refused = run(workspace, joined(cluster), cluster.environment)
        assert refused.returncode == 3, refused.stderr
        assert f"node {THIRD} has statsvc 99.0 and this driver" in refused.stderr

    def test_a_node_without_statsvc(self, cluster: RayCluster, workspace: Path) -> None:
        (workspace / "other" / "workers").mkdir(parents=True)
        (workspace / "other" / "workers" / "__init__.py").write_text(
            "raise ModuleNotFoundError(\"No module named 'workers'\")"
        )
        with cluster.node(THIRD, PYTHONPATH=str(workspace / "other")):
            (workspace / "delay").write_text("0.3")
            refused = run(workspace, joined(cluster), cluster.environment)
        assert refused.returncode == 3, refused.stderr
        assert f"node {THIRD} cannot import statsvc; install statsvc[worker,ray]" in refused.stderr

    def test_a_package_that_is_not_installed(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
        with pytest.raises(PlanError, match=r"pip install 'statsvc\[ray\]', on every node"):
            Cluster("local")

    def test_ray_client_by_its_environment_variable(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("RAY_ADDRESS", "ray://head:10001")
        with pytest.raises(PlanError, match="ray://head:10001 is for Ray Client"):
            Cluster("auto")


class TestWhatAnActorChecks:
    """In this process: another machine is a folder that the driver has not written to."""

    UNIT = Unit("measure", 0, "a.tar", "a.tar", (), ("jpg",), 1, 1, lease="a token")

    def test_a_store_that_is_another_folder_here_is_left_alone(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("workers.engines.ray.actor.SEEN_SECONDS", 0.1)
        actor = Actor()
        setup = WorkerSetup(str(tmp_path / "store"), {}, {}, "cpu", 1, 1)
        assert isinstance(actor.load(setup, True), Ready)
        try:
            answer, images = actor.do(self.UNIT, 1)
        finally:
            actor._worker.__exit__(None, None, None)
        assert isinstance(answer, Failed)
        assert (answer.kind, images) == ("store", 0)
        assert not (tmp_path / "store").exists()

    def test_a_teacher_with_other_weights_here_is_refused(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.chdir(tmp_path)
        (tmp_path / "slowly.py").write_text(TEACHER)
        teacher = resolve("dino", Teacher.model_validate(PYTHON))
        (tmp_path / "slowly.py").write_text(TEACHER.replace("seed(0)", "seed(1)"))
        setup = WorkerSetup(str(tmp_path / "store"), {"dino": teacher}, {"dino": "float32"}, "cpu", 1, 1)
        answer = Actor().load(setup, True)
        assert isinstance(answer, Failed)
        assert answer.kind == "plan"
        assert "other weights than on the driver's machine" in answer.message


def test_workers_on_nodes_with_other_libraries_are_refused_and_other_gpus_only_told_of(
    caplog: pytest.LogCaptureFixture,
) -> None:
    first = {"torch": "2.13", "device": "H100"}
    check_same("a", first, first)
    assert not caplog.text
    check_same("a", first, {**first, "device": "H200"})
    assert "node a may give other last digits: device is H200 there" in caplog.text
    with pytest.raises(EngineError, match=r"node a.*torch is 2\.12 there and 2\.13 elsewhere"):
        check_same("a", first, {**first, "torch": "2.12"})
