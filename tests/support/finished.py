"""The finished store that many tests look at: its dataset shards, its plan, and fixtures of it and of its service.

The conftest.py of a folder names the fixtures that it wants. Without torch they take a store that was finished before,
where TESTS_FINISHED names its folder, and skip what would have to run a teacher.

python -m tests.support.finished FOLDER   makes one there
"""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import workers.driver.run
from statsvc.plan import Plan
from statsvc.progress import Display
from statsvc.store.reader import Store, open_store
from tests.support.contents import contents
from tests.support.damage import Content, content_of, restore
from tests.support.plans import TINY_SIGLIP
from tests.support.service import Running, serving
from tests.support.tiny import photographs, write_tar
from workers.engines import ENGINES
from workers.engines.base import Engine, EngineSetup
from workers.unit.decoders import Decoders

# Made elsewhere, and read here by other versions of Python, numpy and zarr.
MADE_BEFORE = os.environ.get("TESTS_FINISHED")

# Dataset shards of 6, 7 and 6 samples; b has a broken photograph and a sample without one.
SHARDS = {
    "a.tar": photographs("a0", "a1", "a2", "a3", "a4", "a5"),
    "b.tar": [
        *photographs("b0", "b1"),
        ("broken.jpg", b"\xff\xd8\xff no photograph"),
        *photographs("b2"),
        ("words.json", b"{}"),
        *photographs("b3", "b4"),
    ],
    "c.tar": photographs("c0", "c1", "c2", "c3", "c4", "c5"),
}
ROWS_PER_SHARD = 7
ABSENT = [6, 9, 11, 20]  # no seventh sample; broken; without an image; no seventh sample
PRESENT = [row for row in range(21) if row not in ABSENT]
MEAN, STD = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])

Features = dict[str, dict[int, np.ndarray]]


def by_row() -> dict[int, tuple[str, bytes]]:
    """Key and bytes of every sample's first member, by row."""
    return {
        shard * ROWS_PER_SHARD + position: (name.rpartition(".")[0], content)
        for shard, members in enumerate(SHARDS.values())
        for position, (name, content) in enumerate(members)
    }


@dataclass(frozen=True)
class Finished:
    """A folder with dataset shards, a plan over them, and the store that running it gave."""

    folder: Path
    plan: Plan

    @property
    def path(self) -> Path:
        return self.folder / "store"

    @property
    def store(self) -> Store:
        """Opened anew: it knows only what lies on disk."""
        return open_store(str(self.path))

    def run(self) -> int:
        pytest.importorskip("torch")
        return workers.driver.run.run(self.plan, Display())

    def contents(self) -> dict[str, bytes]:
        """Every object of the store by path, without what differs between runs."""
        return contents(self.path)

    def cache_set(self) -> str:
        """The only cache set of dino."""
        (name,) = self.store.teacher("dino").cache_sets()
        return name

    def cache_commit(self, teacher: str, shard: int) -> Path:
        """The commit of a dataset shard in the only cache set of a teacher."""
        (found,) = (self.path / f".statsvc/commits/cache/{teacher}").glob(f"*/{shard:06d}.json")
        return found


@pytest.fixture(scope="session")
def decoders() -> Iterator[Decoders]:
    """One decoder process for all tests."""
    with Decoders(1) as pool:
        yield pool


@pytest.fixture(scope="session")
def dinov2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint folder: a Dinov2 of width 32 for images of 32 x 32, with random weights."""
    if MADE_BEFORE:
        return Path(MADE_BEFORE, "dinov2")
    return write_checkpoint(tmp_path_factory.mktemp("checkpoints") / "dinov2")


@pytest.fixture(scope="session")
def finished_once(dinov2: Path, decoders: Decoders, tmp_path_factory: pytest.TempPathFactory) -> Finished:
    """A finished store of the two teachers `dino` (int8 codes, 16 patches of 32 channels) and `siglip`."""
    if MADE_BEFORE:
        return Finished(Path(MADE_BEFORE), plan_for(Path(MADE_BEFORE), dinov2))
    return finish(tmp_path_factory.mktemp("finished"), dinov2, decoders)


@pytest.fixture(scope="session")
def features(finished_once: Finished, dinov2: Path) -> Features:
    """{output: {row: float64 [T, D]}} of the teacher dino, from a plain forward pass of one image at a time."""
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    from tests.support.in_process import seen_by
    from workers.teachers import resolve
    from workers.unit.loaded_teacher import LoadedTeacher

    plan = finished_once.plan.teachers["dino"]
    shown = LoadedTeacher("dino", resolve("dino", plan), torch.device("cpu"), "float32")  # for its size and filter
    auto_model: Any = transformers.AutoModel
    model = auto_model.from_pretrained(dinov2, dtype=torch.float32).eval()
    found: Features = {"patches": {}, "summary": {}}
    for row in PRESENT:
        pixels = (seen_by(shown, by_row()[row][1]) / 255 - MEAN) / STD
        with torch.inference_mode():
            out = model(torch.tensor(pixels, dtype=torch.float32).permute(2, 0, 1)[None])
        found["patches"][row] = out.last_hidden_state[0, 1:].double().numpy()
        found["summary"][row] = out.pooler_output.double().numpy()
    return found


@pytest.fixture
def finished(
    finished_once: Finished, dinov2: Path, decoders: Decoders, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Finished:
    """A copy of it, which a test may damage, and run again in this process."""
    folder = tmp_path / "finished"
    shutil.copytree(finished_once.folder, folder)
    in_process(monkeypatch, decoders)
    return Finished(folder, plan_for(folder, dinov2))


@pytest.fixture(scope="module")
def damageable_once(
    finished_once: Finished, dinov2: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Finished, Content]:
    """A copy for all tests of a module, and what it holds."""
    folder = tmp_path_factory.mktemp("damageable") / "finished"
    shutil.copytree(finished_once.folder, folder)
    return Finished(folder, plan_for(folder, dinov2)), content_of(folder)


@pytest.fixture
def damageable(damageable_once: tuple[Finished, Content]) -> Iterator[Finished]:
    """A copy which a test may damage, but not run again: it is restored for the next test, and not copied."""
    made, before = damageable_once
    yield made
    restore(made.folder, before)


def write_checkpoint(folder: Path) -> Path:
    """A Dinov2 of width 32 with random weights, always the same."""
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.Dinov2Config(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, mlp_ratio=2, image_size=32, patch_size=8
    )
    transformers.Dinov2Model(config).save_pretrained(folder)
    return folder


def finish(folder: Path, dinov2: Path, decoders: Decoders) -> Finished:
    """Write the dataset shards into a folder and run their plan."""
    for name, members in SHARDS.items():
        write_tar(folder / name, members)
    finished = Finished(folder, plan_for(folder, dinov2))
    with pytest.MonkeyPatch.context() as patch:
        in_process(patch, decoders)
        assert finished.run() == 0
    return finished


def plan_for(folder: Path, dinov2: Path, **changes: Any) -> Plan:
    """The plan of the finished store, with some keys changed."""
    document = {
        "store": str(folder / "store"),
        "data": {"shards": str(folder / "*.tar")},
        "teachers": {"dino": {"source": "transformers", "model": str(dinov2)}, "siglip": TINY_SIGLIP},
        "statistics": {"images": "all"},
        "engine": {"batch_size": 4, "decoders": 1},
        **changes,
    }
    return Plan.model_validate(document)


def in_process(patch: pytest.MonkeyPatch, decoders: Decoders) -> None:
    """Let runs work in this process."""

    def engine(setup: EngineSetup) -> Engine:
        pytest.importorskip("torch")  # which a test that runs nothing does not need
        from tests.support.in_process import InProcess

        return InProcess(setup, decoders)

    patch.setitem(ENGINES, "inline", engine)


@pytest.fixture
def service(damageable: Finished) -> Iterator[Running]:
    """The service of a copy of the finished store, which a test may damage."""
    with serving(damageable.path) as running:
        yield running


@pytest.fixture(scope="session")
def service_once(finished_once: Finished) -> Iterator[Running]:
    """The service of the finished store, for tests that leave it as it is."""
    with serving(finished_once.path) as running:
        yield running


if __name__ == "__main__":
    with Decoders(1) as pool:
        finish(Path(sys.argv[1]), write_checkpoint(Path(sys.argv[1], "dinov2")), pool)
