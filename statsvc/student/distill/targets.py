"""What the store of a plan holds for a recipe: whose targets, of which cache sets, and what of them is held out.

Suffixes: B = rows, T = tokens.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from typing import Any

import numpy as np
import torch

from statsvc.config import nearest
from statsvc.errors import NotFound, PlanError
from statsvc.numerics.transform import Transform
from statsvc.plan import Plan
from statsvc.store.layout import digest_of_fit
from statsvc.store.paths import raw_set_name, set_name
from statsvc.store.reader import Targets, Teacher, open_store
from statsvc.student.data.dataset import TargetDataset
from statsvc.student.distill.recipe import Recipe
from statsvc.student.modules.resample import resample


class Cached:
    """The targets of a plan's teachers, as the plan caches them, for one student.

    targets    of each teacher, by output
    train, held_out   numbers of dataset shards; both the same where none is held out

    Raises PlanError and NotFound for what the plan or the recipe names and the store does not hold.
    """

    def __init__(self, plan: Plan, recipe: Recipe) -> None:
        self._plan, self._recipe = plan, recipe
        self.store = open_store(plan.store)
        names = recipe.teachers or tuple(plan.teachers)
        if unknown := [name for name in names if name not in plan.teachers]:
            raise PlanError(f"teachers: the plan has no {unknown[0]!r}{nearest(unknown[0], plan.teachers)}")
        if unknown := [name for name in recipe.loss.weights if name not in names]:
            raise PlanError(f"loss.weights: no teacher {unknown[0]!r}{nearest(unknown[0], names)}")
        teachers = {name: self.store.teacher(name) for name in names}
        self._sets = {name: self._set(teacher) for name, teacher in teachers.items()}
        method = plan.normalize if plan.targets.space == "teacher" else None
        self.targets: dict[str, dict[str, Targets]] = {
            name: {output: teacher.targets(output, self._sets[name], method) for output in teacher.outputs}
            for name, teacher in teachers.items()
        }
        self.train, self.held_out = self._split()
        self._method = method

    @cached_property
    def transforms(self) -> dict[str, dict[str, Transform]]:
        """Those that the targets were made with, by teacher and output."""
        return {name: {output: t.transform for output, t in each.items()} for name, each in self.targets.items()}

    @property
    def outputs(self) -> dict[str, dict[str, tuple[int, int]]]:
        """Tokens and channels of the targets, by teacher and output."""
        return {name: {output: (t.tokens, t.k) for output, t in each.items()} for name, each in self.targets.items()}

    @property
    def digests(self) -> dict[str, dict[str, str]]:
        """Of the transforms."""
        return {name: {output: t.digest for output, t in each.items()} for name, each in self.transforms.items()}

    def dataset(self, shards: list[int], **keys: Any) -> TargetDataset:
        """Batches of these dataset shards, with the student's images."""
        return TargetDataset(
            self._plan.store, teachers=list(self.targets), outputs=None, cache_sets=self._sets, method=self._method,
            shards=self._plan.data, image_size=self._recipe.model.size, missing="skip", only=shards, **keys,
        )  # fmt: skip

    def on_grid(self, targets: Mapping[str, Mapping[str, torch.Tensor]], grid: tuple[int, int]) -> dict[str, Any]:
        """Targets of a batch with patches brought from each teacher's grid to the student's."""
        found: dict[str, Any] = {}
        for name, outputs in targets.items():
            found[name] = dict(outputs)
            if "patches" in outputs:
                found[name]["patches"] = resample(outputs["patches"], grid, self.targets[name]["patches"].teacher.grid)
        return found

    def counts(self, rows_B: torch.Tensor, grid: tuple[int, int], device: torch.device) -> dict[str, torch.Tensor]:
        """By teacher bool [B, T]: the student's patches that are made of image alone; empty for square views."""
        if not self._is_padded:
            return {}
        found = {}
        for name, outputs in self.targets.items():
            if "patches" in outputs:
                covered_BT1 = torch.from_numpy(outputs["patches"].covered(np.asarray(rows_B)))[..., None].float()
                weight_BT1 = resample(covered_BT1, grid, outputs["patches"].teacher.grid)
                found[name] = (weight_BT1[..., 0] > 0.999).to(device)
        return found

    @cached_property
    def _is_padded(self) -> bool:
        return bool(self.store.views.get("kind") == "whole")

    def _set(self, teacher: Teacher) -> str:
        """The cache set that `statsvc run` writes by the plan."""
        dtype, method, fits = self._plan.targets.dtype, self._plan.normalize, teacher.fits()
        if self._plan.targets.space == "teacher":
            cache_set = raw_set_name(dtype)
        else:
            for output in teacher.outputs:
                if not isinstance(fits.get(output, {}).get(method), str):
                    teacher.transform(method, output)  # raises, and says why there is none
            cache_set = set_name(method, digest_of_fit(methods[method] for methods in fits.values()), dtype)
        if cache_set not in teacher.cache_sets():
            raise NotFound(
                f"teacher {teacher.name} has no targets as the plan has them, {cache_set}; it has "
                f"{', '.join(teacher.cache_sets()) or 'none yet'}: `statsvc run PLAN` makes them"
            )
        return cache_set

    def _split(self) -> tuple[list[int], list[int]]:
        ledger, holdout = self.store.ledger, self._recipe.holdout
        cached = [set(ledger.shards("cache", name, set_)) for name, set_ in self._sets.items()]
        shards = sorted(set.intersection(*cached))
        if holdout == 0 or len(shards) == 1:
            return shards, shards
        if holdout >= len(shards):
            raise PlanError(
                f"holdout: {holdout} of the {len(shards)} dataset shards that are cached leave none to train on; hold "
                "out fewer, or 0 to measure on what the student was trained on"
            )
        return shards[:-holdout], shards[-holdout:]
