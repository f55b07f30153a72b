"""`statsvc distill`: what it leaves, what it goes on from, what it refuses, and two processes that train together.

Suffixes: B = rows, T = tokens, D = channels, S = side of the image in pixels, N = tokens of all rows.
"""

from __future__ import annotations

import io
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from rich.console import Console

import statsvc
import statsvc.student.distill.run
import statsvc.student.distill.training
from statsvc.errors import EngineError, Interrupted, NotFound, PlanError, StoreError
from statsvc.plan import Data, Plan
from statsvc.progress import Bar, Display
from statsvc.student.distill.distributed import Processes
from statsvc.student.distill.evaluate import match
from statsvc.student.distill.objective import Objective
from statsvc.student.distill.recipe import Recipe, Train
from statsvc.student.distill.run import distill
from statsvc.student.distill.targets import Cached
from statsvc.student.distill.training import rate
from statsvc.student.distill.vit import Shape, Student, load_student
from tests import ROOT
from tests.support.finished import MEAN, STD, Finished, by_row, in_process, plan_for
from tests.support.ports import free_port
from tests.support.tiny import photographs, write_tar
from workers.driver.run import run
from workers.unit.decoders import Decoders

STEPS = 8  # of 5 batches in an epoch, so that an epoch ends in between
HELD_OUT = [14, 15, 16, 17, 18, 19]  # the rows of c.tar


def recipe(out: Path, **changes: Any) -> Recipe:
    """A student as small as they come, of both teachers, with some keys changed."""
    train = {"steps": STEPS, "batch_size": 2, "lr": 1e-2, "warmup": 2, "workers": 0, "checkpoint_every": 3}
    document: dict[str, Any] = {
        "out": str(out),
        "model": {"size": 32, "patch": 8, "dim": 16, "depth": 1, "heads": 2},
        "train": train | changes.pop("train", {}),
        **changes,
    }
    return Recipe.model_validate(document)


class Told(Display):
    """What a user reads; and a hook into every step."""

    def __init__(self, on_step: Any = lambda _: None) -> None:
        self.buffer = io.StringIO()
        super().__init__(Console(file=self.buffer, width=200, highlight=False, soft_wrap=True))
        self._on_step, self.steps = on_step, 0

    @property
    def text(self) -> str:
        return self.buffer.getvalue()

    @contextmanager
    def phase(self, name: str, total: int | None, unit: str = "images") -> Iterator[Bar]:
        with super().phase(name, total, unit) as bar:
            told = self

            class Counted:
                def advance(self, images: int) -> None:
                    bar.advance(images)
                    if name == "train":
                        told.steps += images
                        told._on_step(told.steps)

            yield Counted()


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture(scope="module")
def undisturbed(finished_once: Finished, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a student whose training nothing disturbed."""
    out = tmp_path_factory.mktemp("students") / "undisturbed"
    assert distill(finished_once.plan, recipe(out), Told()) == 0
    return out


# What it leaves


def pixels(row: int, size: int) -> torch.Tensor:
    """[1, 3, S, S] of an image as the student's file says it wants it, by Pillow and numpy alone."""
    with Image.open(io.BytesIO(by_row()[row][1])) as opened:
        rgb = opened.convert("RGB")
    side = min(rgb.size)
    x, y = (rgb.width - side) // 2, (rgb.height - side) // 2
    view = np.asarray(rgb.crop((x, y, x + side, y + side)).resize((size, size), Image.Resampling.BICUBIC))
    return torch.tensor((view / 255 - MEAN) / STD, dtype=torch.float32).permute(2, 0, 1)[None]


def test_the_report_tells_how_the_written_student_matches_rows_that_it_never_saw(
    finished_once: Finished, undisturbed: Path
) -> None:
    report = json.loads((undisturbed / "report.json").read_text())
    assert report["measured_on"] == {"dataset_shards": [2], "rows": 6, "held_out": True}
    student = load_student(undisturbed / "student.safetensors")
    with torch.no_grad():
        found = [student(pixels(row, 32)) for row in HELD_OUT]
    for name in ("dino", "siglip"):
        teacher = finished_once.store.teacher(name)
        for output in teacher.outputs:
            true_ND = teacher.targets(output).read(HELD_OUT, space="teacher").reshape(-1, teacher.dims[output])
            found_ND = np.concatenate([each[name][output][0].numpy() for each in found]).astype(np.float64)
            error_ND = found_ND - true_ND
            normalized_ND = error_ND @ teacher.transform("phi-s", output).matrix.T
            told = report["teachers"][name][output]
            assert told["tokens"] == len(true_ND)
            assert told["mse"] == pytest.approx((error_ND**2).mean(), rel=1e-4)
            assert told["unexplained"] == pytest.approx((error_ND**2).mean() / true_ND.var(0, ddof=1).mean(), rel=1e-4)
            for space, error in (("original", error_ND), ("normalized", normalized_ND)):
                assert told["error_variance"][space]["max"] == pytest.approx(error.var(0, ddof=1).max(), rel=1e-3)
                assert told["error_variance"][space]["min"] == pytest.approx(error.var(0, ddof=1).min(), rel=1e-3)


def test_training_teaches(finished_once: Finished, tmp_path: Path) -> None:
    # 300 steps on 11 images, measured on them: a student that always says the mean leaves all of it unexplained.
    changes = {"steps": 300, "checkpoint_every": 300, "batch_size": 8}
    told = Told()
    assert distill(finished_once.plan, recipe(tmp_path / "out", train=changes, holdout=0), told) == 0
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["measured_on"] == {"dataset_shards": [0, 1, 2], "rows": 17, "held_out": False}
    assert report["teachers"]["dino"]["patches"]["unexplained"] < 0.7
    assert "NOTHING IS HELD OUT" in told.text
    assert "TRAINED ON" in told.text


def test_every_epoch_takes_all_rows_in_another_order(
    finished_once: Finished, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []
    real = statsvc.student.distill.training.Training.step

    def watched(self: Any, batch: dict[str, Any]) -> Any:
        seen.extend(batch["rows"].tolist())
        return real(self, batch)

    monkeypatch.setattr(statsvc.student.distill.training.Training, "step", watched)
    changes = {"steps": 33, "batch_size": 1}
    assert distill(finished_once.plan, recipe(tmp_path / "out", train=changes), Told()) == 0
    epochs = [seen[:11], seen[11:22], seen[22:]]
    assert all(sorted(epoch) == [0, 1, 2, 3, 4, 5, 7, 8, 10, 12, 13] for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]


def test_the_learning_rate_rises_then_falls_to_zero() -> None:
    train = Train(steps=100, warmup=10)
    rates = [rate(step, train) for step in range(100)]
    assert rates.index(max(rates)) == 10
    assert max(rates) == 1
    assert all(before < after for before, after in itertools.pairwise(rates[:11]))
    assert all(before > after for before, after in itertools.pairwise(rates[10:]))
    assert rates[55] == pytest.approx(0.5)  # half way down
    assert 0 < rates[-1] < 1e-3


def test_targets_of_another_grid_are_brought_to_the_students(finished_once: Finished, tmp_path: Path) -> None:
    model = {"size": 48, "patch": 8, "dim": 16, "depth": 1, "heads": 2}
    assert distill(finished_once.plan, recipe(tmp_path / "out", model=model, teachers=["dino"]), Told()) == 0
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["teachers"]["dino"]["patches"]["tokens"] == 6 * 36
    assert list(report["teachers"]) == ["dino"]


@pytest.fixture
def ran(
    dinov2: Path, decoders: Decoders, finished_once: Finished, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., Plan]:
    """Runs a plan of dino alone, with some keys changed, over copies of the dataset shards."""
    in_process(monkeypatch, decoders)
    for path in finished_once.folder.glob("*.tar"):
        shutil.copy(path, tmp_path / path.name)

    def ran(**changes: Any) -> Plan:
        plan = plan_for(tmp_path, dinov2, **changes)
        plan = plan.model_copy(update={"teachers": {"dino": plan.teachers["dino"]}})
        assert run(plan, Told()) == 0
        return plan

    return ran


def test_patches_that_are_not_wholly_image_are_neither_learned_nor_measured(
    ran: Callable[..., Plan], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = ran(views={"kind": "whole"})
    seen: list[dict[str, torch.Tensor]] = []
    real = Objective.forward

    def watched(self: Objective, found: Any, targets: Any, counts: dict[str, torch.Tensor]) -> Any:
        seen.append(counts)
        return real(self, found, targets, counts)

    monkeypatch.setattr(Objective, "forward", watched)
    assert distill(plan, recipe(tmp_path / "out"), Told()) == 0
    # Photographs of 40 x 32 on 32 pixels: 26 rows of them, and of 4 rows of patches 3 are wholly image.
    assert all(counts["dino"].view(2, 4, 4).all(2).tolist() == [[True, True, True, False]] * 2 for counts in seen)
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["teachers"]["dino"]["patches"]["tokens"] == 6 * 12
    assert report["teachers"]["dino"]["summary"]["tokens"] == 6


@pytest.mark.parametrize(
    "loss",
    [
        {"patches": "hybrid-smooth-l1", "balance": "ada"},
        {"patches": "cosine", "summary": "mse", "weights": {"siglip": 0.5}},
    ],
)
def test_every_kind_of_loss_goes_on_from_a_checkpoint(
    loss: dict[str, Any], finished_once: Finished, tmp_path: Path
) -> None:
    for name, stops in (("whole", ()), ("broken", (2, 5))):
        for stop in stops:
            with pytest.raises(Interrupted):
                distill(finished_once.plan, recipe(tmp_path / name, loss=loss), Told(interrupt_at(stop)))
        assert distill(finished_once.plan, recipe(tmp_path / name, loss=loss), Told()) == 0
    assert files(tmp_path / "whole")["student.safetensors"] == files(tmp_path / "broken")["student.safetensors"]


def test_bfloat16_is_for_the_forward_pass_alone(finished_once: Finished, tmp_path: Path, undisturbed: Path) -> None:
    changes = {"precision": "bfloat16"}
    assert distill(finished_once.plan, recipe(tmp_path / "out", train=changes), Told()) == 0
    student, other = (load_student(folder / "student.safetensors") for folder in (tmp_path / "out", undisturbed))
    assert all(weight.dtype == torch.float32 for weight in student.parameters())
    differences = [
        float((a - b).detach().abs().max()) for a, b in zip(student.parameters(), other.parameters(), strict=True)
    ]
    assert max(differences) > 0
    checkpoint = torch.load(tmp_path / "out" / "checkpoint.pt", weights_only=True)
    moments = [each for state in checkpoint["optimizer"]["state"].values() for each in state.values()]
    assert all(each.dtype == torch.float32 for each in moments)


def test_a_raw_store_is_normalized_by_the_method_of_the_plan(ran: Callable[..., Plan], tmp_path: Path) -> None:
    raw = ran(targets={"space": "teacher", "dtype": "float32"}, normalize="standardize")
    told = Told()
    assert distill(raw, recipe(tmp_path / "out"), told) == 0
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    teacher = statsvc.open(str(tmp_path / "store")).teacher("dino")
    assert report["transforms"]["dino"]["patches"] == teacher.transform("standardize").digest


# What it goes on from


def interrupt_at(step: int) -> Any:
    """Ctrl-C while a step is taken."""

    def on_step(done: int) -> None:
        if done == step:
            os.kill(os.getpid(), signal.SIGINT)

    return on_step


def test_ctrl_c_keeps_the_step_that_was_taken_and_a_rerun_ends_with_the_very_same_student(
    finished_once: Finished, undisturbed: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    for stop in (1, 4):  # before the first checkpoint, and in the second epoch
        with pytest.raises(Interrupted, match=r"interrupted after step \d, which is kept: the same command goes on"):
            distill(finished_once.plan, recipe(out), Told(interrupt_at(stop)))
        assert set(files(out)) == {"checkpoint.pt"}
    told = Told()
    assert distill(finished_once.plan, recipe(out), told) == 0
    assert "going on after step" in told.text
    assert files(out)["student.safetensors"] == files(undisturbed)["student.safetensors"]
    ours, theirs = (json.loads(files(folder)["report.json"]) for folder in (out, undisturbed))
    assert ours["teachers"] == theirs["teachers"]


@pytest.mark.parametrize(("seconds", "message"), [(-1.0, "interrupted at once"), (60.0, "interrupted after step 2,")])
def test_a_second_ctrl_c_stops_at_once_unless_it_belongs_to_the_first(
    finished_once: Finished, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seconds: float, message: str
) -> None:
    monkeypatch.setattr("statsvc.student.distill.distributed.ONE_REQUEST_SECONDS", seconds)

    def twice(done: int) -> None:
        if done == 1:
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(Interrupted, match=message):
        distill(finished_once.plan, recipe(tmp_path / "out"), Told(twice))
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_student_goes_on_with_its_dataset_shards_when_the_store_has_grown(
    finished: Finished, undisturbed: Path, tmp_path: Path
) -> None:
    finished = Finished(finished.folder, plan_with_tars(finished, "abc"))
    out = tmp_path / "out"
    with pytest.raises(Interrupted):
        distill(finished.plan, recipe(out), Told(interrupt_at(2)))
    write_tar(finished.folder / "d.tar", photographs("d0", "d1"))
    grown = Finished(finished.folder, plan_with_tars(finished, "abcd"))
    assert grown.run() == 0
    assert distill(grown.plan, recipe(out), Told()) == 0
    assert files(out)["student.safetensors"] == files(undisturbed)["student.safetensors"]
    assert json.loads(files(out)["report.json"])["measured_on"]["dataset_shards"] == [2]


def plan_with_tars(finished: Finished, names: str) -> Plan:
    shards = tuple(str(finished.folder / f"{name}.tar") for name in names)
    return finished.plan.model_copy(update={"data": Data(shards=shards)})


def test_a_folder_that_cannot_be_written_is_refused_before_the_first_step(
    finished_once: Finished, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("not a folder")
    for out in (tmp_path / "file", tmp_path / "file" / "below"):
        told = Told()
        with pytest.raises(PlanError, match=r"out: '.*file' is a file; name a folder"):
            distill(finished_once.plan, recipe(out), told)
        assert told.steps == 0


def test_a_training_that_is_done_is_only_measured(finished_once: Finished, undisturbed: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    shutil.copytree(undisturbed, out)
    (out / "report.json").unlink()
    (out / "student.safetensors.partial-1").write_bytes(b"of a process that died")
    told = Told()
    assert distill(finished_once.plan, recipe(out), told) == 0
    assert told.steps == 0
    assert set(files(out)) == {"checkpoint.pt", "report.json", "student.safetensors"}


def test_a_finished_student_is_left_alone(finished_once: Finished, undisturbed: Path) -> None:
    before, told = files(undisturbed), Told()
    free = recipe(undisturbed, train={"checkpoint_every": 5, "workers": 1})  # neither changes a number
    assert distill(finished_once.plan, free, told) == 0
    assert "nothing to do" in told.text
    assert files(undisturbed) == before


def test_reading_processes_change_nothing(finished_once: Finished, undisturbed: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    changes = {"workers": 2}
    with pytest.raises(Interrupted):
        distill(finished_once.plan, recipe(out, train=changes), Told(interrupt_at(4)))
    assert distill(finished_once.plan, recipe(out, train=changes), Told()) == 0
    assert files(out)["student.safetensors"] == files(undisturbed)["student.safetensors"]


# What it refuses


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"train": {"lr": 0.02}}, r"train\.lr is 0\.01 there and 0\.02 here"),
        ({"train": {"steps": 9}}, r"train\.steps is 8 there and 9 here"),
        ({"loss": {"balance": "ada"}}, r"loss\.balance is none there and ada here"),
        ({"model": {"size": 32, "patch": 8, "dim": 32, "depth": 1, "heads": 2}}, r"model\.dim is 16 there and 32 here"),
        ({"holdout": 2}, r"holdout is 1 there and 2 here"),
        ({"teachers": ["dino"]}, r"teachers is None there and \['dino'\] here"),
    ],
)
def test_a_checkpoint_of_another_recipe_is_refused(
    changes: dict[str, Any], field: str, finished_once: Finished, undisturbed: Path
) -> None:
    before = files(undisturbed)
    with pytest.raises(PlanError, match=rf"holds a student of another recipe: .*{field}.*another folder"):
        distill(finished_once.plan, recipe(undisturbed, **changes), Told())
    assert files(undisturbed) == before


def test_a_checkpoint_is_loaded_as_numbers_never_as_code(finished_once: Finished, tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> Any:
            return os.mkdir, (str(tmp_path / "executed"),)

    (tmp_path / "out").mkdir()
    torch.save({"identity": "{}", "evil": Evil()}, tmp_path / "out" / "checkpoint.pt")
    with pytest.raises(StoreError, match=r"checkpoint\.pt is no checkpoint .* remove it to begin anew"):
        distill(finished_once.plan, recipe(tmp_path / "out"), Told())
    assert not (tmp_path / "executed").exists()


def test_a_folder_with_other_things_is_left_alone(finished_once: Finished, tmp_path: Path) -> None:
    (tmp_path / "letters.txt").write_text("dear")
    with pytest.raises(PlanError, match=r"holds 'letters.txt' and no checkpoint; name a new or empty folder"):
        distill(finished_once.plan, recipe(tmp_path), Told())


@pytest.mark.parametrize(
    ("changes", "error", "sentence"),
    [
        ({"teachers": ["dyno"]}, PlanError, r"teachers: the plan has no 'dyno' \(did you mean 'dino'\?\)"),
        (
            {"loss": {"weights": {"siglop": 2.0}}},
            PlanError,
            r"loss\.weights: no teacher 'siglop' \(did you mean 'siglip'\?\)",
        ),
        ({"holdout": 3}, PlanError, r"holdout: 3 of the 3 dataset shards that are cached leave none to train on"),
        ({"train": {"batch_size": 12}}, PlanError, r"12"),
    ],
)
def test_what_does_not_fit_the_plan_is_refused_before_anything_is_written(
    changes: dict[str, Any], error: type[Exception], sentence: str, finished_once: Finished, tmp_path: Path
) -> None:
    with pytest.raises(error, match=sentence):
        distill(finished_once.plan, recipe(tmp_path / "out", **changes), Told())
    assert not (tmp_path / "out").exists()


def test_targets_that_are_not_cached_are_told_with_what_makes_them(finished_once: Finished, tmp_path: Path) -> None:
    plan = finished_once.plan.model_copy(
        update={"targets": finished_once.plan.targets.model_copy(update={"dtype": "int4"})}
    )
    with pytest.raises(
        NotFound, match=r"no targets as the plan has them, phi-s-\w+-int4; it has phi-s-\w+-int8: `statsvc run"
    ):
        distill(plan, recipe(tmp_path / "out"), Told())


def test_a_loss_that_is_not_finite_ends_the_training_with_the_last_checkpoint_kept(
    finished_once: Finished, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = statsvc.student.distill.training.Training._loss

    def spoiled(self: Any, batch: dict[str, Any]) -> Any:
        loss, terms = real(self, batch)
        return (loss * torch.nan if self.done == 4 else loss), terms

    monkeypatch.setattr(statsvc.student.distill.training.Training, "_loss", spoiled)
    with pytest.raises(EngineError, match=r"step 5: loss nan .* choose a smaller train\.lr"):
        distill(finished_once.plan, recipe(tmp_path / "out"), Told())
    assert torch.load(tmp_path / "out" / "checkpoint.pt", weights_only=True)["step"] == 3


def test_weights_that_are_not_finite_are_never_kept(
    finished_once: Finished, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A gradient may overflow where the loss does not.
    students: list[Student] = []

    def made(shape: Shape) -> Student:
        students.append(Student(shape))
        return students[-1]

    def spoil(done: int) -> None:
        if done == 6:
            with torch.no_grad():
                students[0].places[0, 0, 0] = torch.inf

    monkeypatch.setattr(statsvc.student.distill.run, "Student", made)
    with pytest.raises(EngineError, match=r"a weight is not finite after step 6; choose a smaller train\.lr"):
        distill(finished_once.plan, recipe(tmp_path / "out"), Told(spoil))
    assert torch.load(tmp_path / "out" / "checkpoint.pt", weights_only=True)["step"] == 3


# Real processes


def command(plan: Plan, made: Recipe, folder: Path) -> list[str]:
    for name, document in (("plan", plan), ("student", made)):
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(document.model_dump(mode="json")))
    return ["-m", "statsvc.cli", "distill", str(folder / "plan.yaml"), str(folder / "student.yaml")]


ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}


def started(arguments: list[str]) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, *arguments], env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        start_new_session=True,
    )  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("sent", [signal.SIGKILL, signal.SIGINT])
def test_a_process_that_is_killed_leaves_what_a_rerun_goes_on_from(
    sent: signal.Signals, finished_once: Finished, tmp_path: Path
) -> None:
    # So many steps that it cannot be done before the signal; the rerun of a shorter one would be another recipe.
    long = {"steps": 200, "checkpoint_every": 10, "workers": 1}
    made = recipe(tmp_path / "out", train=long)
    process = started(command(finished_once.plan, made, tmp_path))
    while not (tmp_path / "out" / "checkpoint.pt").exists():
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)
    os.killpg(process.pid, sent)  # as a terminal sends Ctrl-C: to its readers too
    output, error = process.communicate(timeout=300)
    assert process.returncode == (-signal.SIGKILL if sent == signal.SIGKILL else 130), output + error
    assert "Traceback" not in error
    assert not (tmp_path / "out" / "report.json").exists()
    assert ("which is kept: the same command goes on" in error) == (sent == signal.SIGINT)

    assert distill(finished_once.plan, made, Told()) == 0
    assert distill(finished_once.plan, recipe(tmp_path / "whole", train=long), Told()) == 0
    assert files(tmp_path / "out")["student.safetensors"] == files(tmp_path / "whole")["student.safetensors"]


@pytest.mark.slow
def test_two_processes_train_one_student_and_measure_it_together(finished_once: Finished, tmp_path: Path) -> None:
    made = recipe(tmp_path / "out", loss={"balance": "ada"}, holdout=0)  # 17 rows to measure: one is repeated
    port = ["--master_port", str(free_port())]
    arguments = ["-m", "torch.distributed.run", "--nproc_per_node", "2", *port]
    process = started([*arguments, *command(finished_once.plan, made, tmp_path)])
    output, error = process.communicate(timeout=300)
    assert process.returncode == 0, output + error
    assert output.count("a student of") == 1  # one of them tells
    assert set(files(tmp_path / "out")) == {"checkpoint.pt", "report.json", "student.safetensors"}
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["processes"] == 2

    # What each measured of its part, added up, is what one process finds on all rows; sums of float64.
    alone = measured(finished_once, made, tmp_path / "out" / "student.safetensors")
    for output_, told in report["teachers"]["dino"].items():
        assert told["tokens"] == alone["dino"][output_]["tokens"]
        assert told["mse"] == pytest.approx(alone["dino"][output_]["mse"], rel=1e-6)
    with pytest.raises(PlanError, match="processes is 2 there and 1 here"):
        distill(finished_once.plan, made, Told())


def measured(finished: Finished, made: Recipe, path: Path) -> dict[str, Any]:
    cached, group = Cached(finished.plan, made), Processes(0, 1, torch.device("cpu"))
    dataset = cached.dataset(cached.held_out, batch_size=4, space="teacher")
    with Told().phase("measure", None) as bar:
        return match(load_student(path), dataset, cached, group, bar)


def test_processes_share_a_batch_evenly_or_not_at_all(
    finished_once: Finished, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "3")
    monkeypatch.setattr(torch.distributed, "init_process_group", lambda *_, **__: None)
    with pytest.raises(PlanError, match=r"train\.batch_size: 2 rows are not shared evenly by 3 processes"):
        distill(finished_once.plan, recipe(tmp_path / "out"), Told())
