"""`statsvc distill`: train a reference student on cached targets, measure it, and write it with its heads folded.

    train, with a checkpoint every so many steps and on Ctrl-C; a rerun goes on from the last one
    fold, check, measure on what was held out, write student.safetensors, then report.json

On the CPU a training that was broken off ends with the very weights of one that was left alone.
"""

from __future__ import annotations

import json
from typing import Any

import torch
from rich.console import Console

from statsvc.errors import Interrupted, PlanError
from statsvc.plan import Plan
from statsvc.progress import Display
from statsvc.student.data.dataset import IMAGENET_MEAN, IMAGENET_STD, TargetDataset
from statsvc.student.distill.checkpoint import REPORT, STUDENT, Folder, flat
from statsvc.student.distill.distributed import Processes, processes
from statsvc.student.distill.evaluate import match
from statsvc.student.distill.fold_heads import check_fold, fold
from statsvc.student.distill.recipe import Recipe
from statsvc.student.distill.report import report_lines
from statsvc.student.distill.targets import Cached
from statsvc.student.distill.training import Training
from statsvc.student.distill.vit import Shape, Student, student_bytes

# What may change between two runs of one training; nothing else may.
FREE = ("out", "train.workers", "train.checkpoint_every")
TOLD = 20  # lines about the loss in a whole training


def distill(plan: Plan, recipe: Recipe, show: Display) -> int:
    """Do what is missing and return 0.

    Raises PlanError and NotFound before anything is written, EngineError where the loss is not finite, Interrupted
    after a checkpoint on Ctrl-C.
    """
    with processes() as group:
        if not group.is_first:
            show = Display(Console(quiet=True))
        rows = recipe.train.batch_size
        if rows % group.world_size:
            raise PlanError(
                f"train.batch_size: {rows} rows are not shared evenly by {group.world_size} processes; choose a "
                "multiple"
            )
        cached = Cached(plan, recipe)
        folder = Folder(recipe.out, identity(recipe, cached, group))
        state = folder.read(group.device)
        if state is not None and folder.is_finished:
            show.line(f"nothing to do: {folder.path} holds the student of this recipe, and its report")
            return 0
        if state is not None:
            cached.train, cached.held_out = state["train"], state["held_out"]  # the store may have grown since
        torch.manual_seed(recipe.train.seed)
        model = recipe.model.model_dump()
        student = Student(Shape(**model, outputs=cached.outputs, mean=IMAGENET_MEAN, std=IMAGENET_STD))
        _check_rows(recipe, cached)
        dataset = cached.dataset(
            cached.train, batch_size=rows // group.world_size, seed=recipe.train.seed, tail="drop"
        )  # fmt: skip
        held_out = cached.dataset(
            cached.held_out, batch_size=rows // group.world_size, space="teacher", shuffle=False
        )  # fmt: skip
        training = Training(recipe, student.to(group.device), dataset, cached, group)
        _introduce(training, cached, group, show)
        if state is not None:
            training.load_state_dict(state)
            show.line(f"going on after step {training.done} of {recipe.train.steps}")
        group.wait()  # until all have seen the folder as it is
        if group.is_first:
            folder.sweep()
        _train(training, recipe, folder, group, show)
        _finish(student.eval(), recipe, cached, held_out, folder, group, show)
    return 0


def identity(recipe: Recipe, cached: Cached, group: Processes) -> dict[str, Any]:
    """What decides the numbers of a student, by name."""
    settings = {name: value for name, value in flat(recipe.model_dump(mode="json")).items() if name not in FREE}
    return {**settings, **flat({"transforms": cached.digests}), "processes": group.world_size}


def _check_rows(recipe: Recipe, cached: Cached) -> None:
    rows = cached.dataset(cached.train, batch_size=1).counts()["rows"]
    if rows < recipe.train.batch_size:
        raise PlanError(
            f"train.batch_size: {recipe.train.batch_size} rows, and the {len(cached.train)} dataset shards to train on "
            f"have {rows}; choose fewer"
        )


def _introduce(training: Training, cached: Cached, group: Processes, show: Display) -> None:
    weights = sum(parameter.numel() for parameter in training.student.parameters())
    rows = training.dataset.counts()["rows"]
    show.line(
        f"a student of {weights:,} weights on {group.world_size} x {group.device.type} in {training.precision}; "
        f"teachers: {', '.join(cached.targets)}; {rows} rows of {len(cached.train)} dataset shards"
    )
    if cached.train == cached.held_out:
        show.line(
            "NOTHING IS HELD OUT: the student will be measured on the rows it is trained on, which says little of "
            "others; hold out a dataset shard, and cache a second one where there is no other"
        )


def _train(training: Training, recipe: Recipe, folder: Folder, group: Processes, show: Display) -> None:
    train, batches = recipe.train, training.batches()
    with show.phase("train", train.steps - training.done, "steps") as bar:
        while training.done < train.steps:
            told, stopping = training.step(next(batches))
            bar.advance(1)
            if training.done % max(train.steps // TOLD, 1) == 0:
                show.line(f"step {training.done}: {told}")
            if stopping or training.done == train.steps or training.done % train.checkpoint_every == 0:
                state = training.state_dict()
                if group.is_first:
                    folder.write_checkpoint(state)
                group.wait()
            if stopping:
                raise Interrupted(f"interrupted after step {training.done}, which is kept: the same command goes on")


def _finish(
    student: Student, recipe: Recipe, cached: Cached, dataset: TargetDataset, folder: Folder, group: Processes,
    show: Display,
) -> None:  # fmt: skip
    """Fold, measure, write; the report last."""
    folded = fold(student, cached.transforms)
    check_fold(student, folded, cached.transforms, next(iter(dataset))["image"].to(group.device))
    with show.phase("measure", len(dataset), "batches") as bar:
        found = match(folded, dataset, cached, group, bar)
    if group.is_first:
        report = {
            "recipe": recipe.model_dump(mode="json"),
            "transforms": cached.digests,
            "processes": group.world_size,
            "measured_on": {
                "dataset_shards": cached.held_out,
                "rows": dataset.counts()["rows"],
                "held_out": cached.train != cached.held_out,
            },
            "channels": {
                name: {output: {"kept": t.rank, "of": len(t.mean)} for output, t in each.items()}
                for name, each in cached.transforms.items()
            },
            "teachers": found,
        }
        folder.write(STUDENT, student_bytes(folded, {"transforms": cached.digests, "space": "teacher"}))
        folder.write(REPORT, (json.dumps(report, indent=1, allow_nan=False) + "\n").encode())
        for line in report_lines(report):
            show.line(line)
        show.line(f"{folder.path / STUDENT}: the student, in every teacher's own space; {REPORT} lies beside it")
    group.wait()
