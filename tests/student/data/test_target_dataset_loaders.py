"""TargetDataset in the loops that people have, and its resume."""

from __future__ import annotations

import multiprocessing
import shutil
import time
from collections import Counter, deque
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import pytorch_lightning
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader
from torchdata.stateful_dataloader import StatefulDataLoader

from statsvc.errors import PlanError
from statsvc.student import TargetDataset, decode
from tests.student.data.test_target_dataset import same
from tests.support.ddp_rank import train
from tests.support.finished import Finished
from tests.support.ports import free_port
from tests.support.stores import MadeTeacher, write_store

# More workers than this machine has cores; what torchdata and Lightning use of torch.
pytestmark = [
    pytest.mark.filterwarnings("ignore:This DataLoader will create"),
    pytest.mark.filterwarnings("ignore:'set_vital' is deprecated"),
    pytest.mark.filterwarnings("ignore:Your `IterableDataset` has `__len__` defined"),
    pytest.mark.filterwarnings("ignore:.*LeafSpec.*is deprecated:FutureWarning"),
]
Batch = dict[str, Any]
TEACHERS = {"wide": MadeTeacher(tokens=3, dim=5), "half": MadeTeacher(tokens=1, dim=2, dtype="int4")}


@pytest.fixture(autouse=True)
def quick(unsynced: None) -> None:
    pass


@pytest.fixture(scope="module")
def location(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """5 dataset shards of 9, 0, 7, 1 and 6 samples: 23 rows."""
    return write_store(tmp_path_factory.mktemp("loaders") / "store", [9, 0, 7, 1, 6], TEACHERS)


def make(location: Path, **options: Any) -> TargetDataset:
    return TargetDataset(location, **{"batch_size": 4, "window": 8, "missing": "error", **options})


def loader(dataset: TargetDataset, workers: int, **options: Any) -> DataLoader[Any]:
    if workers:
        options = {"num_workers": workers, "multiprocessing_context": "fork", **options}
    return DataLoader(dataset, batch_size=None, **options)


def copied(batches: Iterator[Batch] | DataLoader[Any]) -> list[Batch]:
    """Batches whose memory is theirs alone."""

    def copy(value: Any) -> Any:
        if isinstance(value, dict):
            return {name: copy(each) for name, each in value.items()}
        return value.clone() if isinstance(value, torch.Tensor) else value

    return [copy(batch) for batch in batches]


def all_same(one: list[Batch], other: list[Batch]) -> bool:
    return len(one) == len(other) and all(map(same, one, other))


@pytest.mark.slow
# Without shrinking: each example starts processes.
@settings(
    max_examples=12, suppress_health_check=[HealthCheck.function_scoped_fixture], phases=[Phase.reuse, Phase.generate]
)
@given(st.data())
def test_each_row_comes_once_whatever_the_ranks_and_workers_and_wherever_it_is_broken_off(
    tmp_path: Path, data: st.DataObject
) -> None:
    shutil.rmtree(tmp_path / "store", ignore_errors=True)
    counts = data.draw(st.lists(st.integers(0, 12), min_size=1, max_size=6).filter(any), "counts")
    write_store(tmp_path / "store", counts, TEACHERS)
    world_size, batch_size = data.draw(st.integers(1, 4), "ranks"), data.draw(st.integers(1, 9), "batch size")
    tails = ["pad", "drop"] if sum(counts) >= world_size * batch_size else ["pad"]
    options = {
        "world_size": world_size,
        "batch_size": batch_size,
        "window": data.draw(st.integers(1, 30), "window"),
        "seed": data.draw(st.integers(0, 99), "seed"),
        "tail": data.draw(st.sampled_from(tails), "tail"),
        "reuse_buffers": data.draw(st.booleans(), "reuse"),
    }
    epoch = data.draw(st.integers(0, 3), "epoch")
    taken: Counter[int] = Counter()
    for rank in range(world_size):
        dataset = make(tmp_path / "store", rank=rank, **options)
        dataset.set_epoch(epoch)
        whole = copied(loader(dataset, data.draw(st.integers(0, 3), "workers")))
        assert [batch["step"] for batch in whole] == list(range(len(dataset)))
        for batch in whole:
            taken.update(batch["rows"][~batch["padding"]].tolist())
        stop = data.draw(st.integers(0, len(whole)), "stop")
        resumed = make(tmp_path / "store", rank=rank, **options)
        resumed.load_state_dict({**resumed.state_dict(), "epoch": epoch})
        if stop:
            resumed.load_state_dict(dataset.state_dict(whole[stop - 1]))
        rest = copied(loader(resumed, data.draw(st.integers(0, 3), "workers after it")))
        assert all_same(rest, whole[stop:])
    assert set(taken.values()) == {1}
    left_out = sum(counts) - len(taken)
    assert left_out == 0 if options["tail"] == "pad" else left_out < world_size * batch_size


@pytest.mark.parametrize("workers", [0, 2])
def test_what_was_broken_off_goes_on_once_and_the_next_iteration_begins_anew(location: Path, workers: int) -> None:
    dataset = make(location)
    whole = copied(loader(dataset, workers))
    dataset.load_state_dict(dataset.state_dict(whole[2]))
    again = loader(dataset, workers)
    dataset.set_epoch(0)  # as a training loop says it before each epoch, this one too
    assert all_same(copied(again), whole[3:])
    assert all_same(copied(again), whole)
    dataset.load_state_dict(dataset.state_dict(whole[2]))
    dataset.set_epoch(1)
    assert [batch["step"] for batch in again] == list(range(len(dataset)))


def test_without_workers_the_dataset_knows_itself_where_it_stands(location: Path) -> None:
    dataset = make(location)
    whole = copied(iter(dataset))
    assert dataset.state_dict()["step"] == len(whole)
    batches = iter(dataset)
    list(islice(batches, 2))
    state = dataset.state_dict()
    fresh = make(location)
    fresh.load_state_dict(state)
    assert all_same(copied(iter(fresh)), whole[2:])
    assert {key: type(value) for key, value in state.items()} == {
        "epoch": int, "step": int, "dataset_shards": str, "batch_size": int, "window": int, "seed": int,
        "shuffle": bool, "world_size": int, "tail": str,
    }  # fmt: skip


@pytest.mark.parametrize(
    "changed", [{"seed": 1}, {"batch_size": 5}, {"window": 9}, {"shuffle": False}, {"tail": "drop"}, {"only": [0, 2]}]
)
def test_the_state_of_another_order_is_refused_with_what_differs(location: Path, changed: dict[str, Any]) -> None:
    state = make(location).state_dict()
    name = "dataset_shards" if "only" in changed else next(iter(changed))
    with pytest.raises(PlanError, match=f"gives other batches: {name} was .* and is"):
        make(location, **changed).load_state_dict(state)


def test_a_seed_is_the_same_number_in_every_type_and_a_state_must_be_one(location: Path) -> None:
    state = make(location, seed=1).state_dict()
    as_numpy = make(location, seed=np.int64(1))
    as_numpy.load_state_dict(state)
    assert all_same(copied(iter(as_numpy)), copied(iter(make(location, seed=1))))
    for wrong, message in (
        ({**state, "step": 9999}, "after 9999 batches of an epoch, which has 6"),
        ({**state, "step": None}, "step must be a whole number, not None"),
        (None, "a state is what state_dict"),
    ):
        with pytest.raises(PlanError, match=message):
            make(location, seed=1).load_state_dict(wrong)  # type: ignore[arg-type]
    with pytest.raises(PlanError, match=r"epoch must be a whole number, not 1\.5"):
        as_numpy.set_epoch(1.5)  # type: ignore[arg-type]


def test_persistent_workers_are_told_of_each_epoch(location: Path) -> None:
    dataset = make(location)
    batches = loader(dataset, 2, persistent_workers=True)
    for epoch in range(3):
        dataset.set_epoch(epoch)
        alone = make(location)
        alone.set_epoch(epoch)
        assert all_same(copied(batches), copied(iter(alone)))


@pytest.mark.slow
@pytest.mark.parametrize("context", ["fork", "spawn"])
def test_workers_hand_batches_over_in_one_piece_of_shared_memory(location: Path, context: str) -> None:
    for batch in loader(make(location), 1, multiprocessing_context=context):
        arrays = [batch["rows"], batch["padding"], *(y for o in batch["targets"].values() for y in o.values())]
        assert all(array.is_shared() for array in arrays)
        assert len({array.untyped_storage().data_ptr() for array in arrays}) == 1


@pytest.mark.parametrize(("workers", "prefetch_factor"), [(0, None), (1, 2), (1, 8), (2, 5)])
def test_a_reused_buffer_is_never_overwritten_while_anything_refers_to_it(
    location: Path, workers: int, prefetch_factor: int | None
) -> None:
    dataset = make(location, batch_size=1, reuse_buffers=True)
    plain = copied(iter(make(location, batch_size=1)))
    kept: deque[tuple[torch.Tensor, torch.Tensor]] = deque(maxlen=6)
    options = {"prefetch_factor": prefetch_factor} if workers else {}
    for step, batch in enumerate(loader(dataset, workers, **options)):
        time.sleep(0.02)  # workers are ahead
        assert same(batch, plain[step])
        # Of some batches only a view of one array is kept, for a while.
        kept.append((batch["targets"]["wide"]["patches"][:, 1:, ::2], plain[step]["targets"]["wide"]["patches"]))
        assert all(torch.equal(view, whole[:, 1:, ::2]) for view, whole in kept)


@pytest.mark.parametrize("workers", [0, 1])
def test_buffers_are_used_again_and_stay_mapped(location: Path, workers: int) -> None:
    dataset, places = make(location, batch_size=1, reuse_buffers=True), set()
    for batch in loader(dataset, workers):
        time.sleep(0.02)
        places.add(batch["rows"].untyped_storage().data_ptr())
    assert len(dataset) > 20
    assert 2 <= len(places) <= 6  # in turn; with a worker, those that wait to be taken


def test_persistent_workers_that_begin_late_go_on_once_too(location: Path) -> None:
    dataset = make(location, batch_size=1)
    whole = copied(iter(make(location, batch_size=1)))
    batches = loader(dataset, 2, persistent_workers=True, worker_init_fn=_second_is_late)
    dataset.load_state_dict({**dataset.state_dict(), "step": 7})
    assert same(next(iter(batches)), whole[7])  # and the loop is left
    assert all_same(copied(batches), whole)


def _second_is_late(worker: int) -> None:
    time.sleep(worker)


def test_only_workers_know_how_far_they_are_so_the_batch_must_be_given(location: Path) -> None:
    dataset = make(location)
    batch = next(iter(loader(dataset, 1)))
    with pytest.raises(PlanError, match=r"say which one was used last, state_dict\(batch\)"):
        dataset.state_dict()
    assert dataset.state_dict(batch)["step"] == 1


@pytest.mark.gpu
def test_with_a_cuda_device_reused_buffers_are_pinned_and_codes_are_decoded_there(location: Path) -> None:
    decoded = copied(iter(make(location)))
    for step, batch in enumerate(make(location, decode=False, reuse_buffers=True)):
        stored = batch["targets"]["wide"]["patches"]
        assert stored["codes"].is_pinned()
        on_device = {name: array.to("cuda", non_blocking=True) for name, array in stored.items()}
        assert torch.equal(decode(**on_device).cpu(), decoded[step]["targets"]["wide"]["patches"])


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("stop", [0, 1, 3, 5])
def test_stateful_data_loader_goes_on_with_the_very_next_batch(location: Path, workers: int, stop: int) -> None:
    def stateful() -> StatefulDataLoader[Any]:
        extra: dict[str, Any] = {"multiprocessing_context": "fork"} if workers else {}
        return StatefulDataLoader(make(location), batch_size=None, num_workers=workers, **extra)

    whole = copied(stateful())
    first = stateful()
    batches = iter(first)
    before = copied(islice(batches, stop))
    state = first.state_dict()
    del batches
    second = stateful()
    second.load_state_dict(state)
    assert all_same(before + copied(second), whole)


def test_lightning_trains_on_it_over_epochs_and_workers(location: Path, tmp_path: Path) -> None:
    dataset = make(location, teachers=["wide"])
    seen: dict[int, list[int]] = {}

    class Student(pytorch_lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.head = torch.nn.Linear(5, 5)

        def on_train_epoch_start(self) -> None:
            dataset.set_epoch(self.current_epoch)

        def training_step(self, batch: Batch, _: int) -> torch.Tensor:
            seen.setdefault(self.current_epoch, []).extend(batch["rows"].tolist())
            y = batch["targets"]["wide"]["patches"]
            return torch.nn.functional.mse_loss(self.head(y), y)

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), 0.1)

    trainer = pytorch_lightning.Trainer(
        max_epochs=2, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, default_root_dir=tmp_path,
    )  # fmt: skip
    trainer.fit(Student(), loader(dataset, 2))
    everything = sorted(row for batch in make(location) for row in batch["rows"].tolist())
    assert [sorted(rows) for rows in seen.values()] == [everything, everything]
    assert seen[0] != seen[1]


@pytest.mark.slow
def test_ddp_ranks_have_as_many_batches_and_share_the_rows(location: Path) -> None:
    context, port = multiprocessing.get_context("spawn"), free_port()
    with context.Manager() as manager:
        shared = manager.dict()
        ranks = [context.Process(target=train, args=(rank, port, str(location), shared)) for rank in range(2)]
        for rank in ranks:
            rank.start()
        for rank in ranks:
            rank.join(120)
        results = dict(shared)
    everything = sorted(row for batch in make(location) for row in batch["rows"].tolist())
    assert sorted(results[0] + results[1]) == everything


@pytest.mark.slow
def test_images_and_targets_agree_in_workers_that_fork_and_that_spawn(finished_once: Finished) -> None:
    dataset = TargetDataset(finished_once.path, batch_size=5, image_size=16, outputs=None)
    alone = copied(iter(dataset))
    for context in ("fork", "spawn"):
        assert all_same(copied(loader(dataset, 2, multiprocessing_context=context)), alone)
