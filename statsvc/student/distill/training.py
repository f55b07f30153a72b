"""Everything that training changes, and one step of it.

    image -> student (autocast) -> objective (float32) -> AdamW

Suffixes: B = rows, T = tokens, k = channels of a target, S = side of the image in pixels.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader

from statsvc.errors import EngineError
from statsvc.student.data.dataset import TargetDataset
from statsvc.student.distill.distributed import Processes, deaf, reading_processes
from statsvc.student.distill.objective import Objective
from statsvc.student.distill.recipe import Recipe, Train
from statsvc.student.distill.targets import Cached
from statsvc.student.distill.vit import Student

ADVICE = "choose a smaller train.lr, a longer train.warmup or precision: float32; the last checkpoint is kept"


class Training:
    """Student, objective, optimizer and place in the dataset; the learning rate is a function of `done`.

    done  steps so far
    """

    def __init__(
        self, recipe: Recipe, student: Student, dataset: TargetDataset, cached: Cached, group: Processes
    ) -> None:
        self._train, self._cached, self._group = recipe.train, cached, group
        self.student, self.dataset, self.done = student, dataset, 0
        outputs = {name: tuple(each) for name, each in cached.outputs.items()}
        self._objective = Objective(recipe.loss, outputs).to(group.device)
        self._optimizer = torch.optim.AdamW(
            student.parameters(), lr=recipe.train.lr, weight_decay=recipe.train.weight_decay
        )
        self._model: nn.Module = student if group.world_size == 1 else DistributedDataParallel(student)
        self._last: dict[str, Any] | None = None
        self.precision = precision(recipe.train, group.device)

    def state_dict(self) -> dict[str, Any]:
        """After the last step. Raises EngineError where a weight is not finite: nobody could go on from that."""
        if not all(weight.isfinite().all() for weight in self.student.parameters()):
            raise EngineError(f"a weight is not finite after step {self.done}; {ADVICE}")
        return {
            "step": self.done,
            "student": self.student.state_dict(),
            "objective": self._objective.state_dict(),
            "optimizer": self._optimizer.state_dict(),
            "train": self._cached.train,
            "held_out": self._cached.held_out,
            "dataset": self.dataset.state_dict(self._last),
            "rng": torch.get_rng_state(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.done = state["step"]
        self.student.load_state_dict(state["student"])
        self._objective.load_state_dict(state["objective"])
        self._optimizer.load_state_dict(state["optimizer"])
        self.dataset.load_state_dict(state["dataset"])
        torch.set_rng_state(state["rng"].cpu())

    def batches(self) -> Iterator[dict[str, Any]]:
        """Epoch after epoch, from where the dataset stands."""
        workers = reading_processes(self._train.workers, self._group.device)
        loader: DataLoader[dict[str, Any]] = DataLoader(
            self.dataset, batch_size=None, num_workers=workers, persistent_workers=workers > 0, worker_init_fn=deaf
        )
        while True:
            yield from loader
            self.dataset.set_epoch(self.dataset.epoch + 1)

    def step(self, batch: dict[str, Any]) -> tuple[str, bool]:
        """The loss and its terms as text, and whether any process was asked to stop. Raises EngineError for NaN."""
        for each in self._optimizer.param_groups:
            each["lr"] = self._train.lr * rate(self.done, self._train)
        loss, terms = self._loss(batch)
        self._optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        mean, stopping = self._group.mean_and_any(loss, self._group.stopping)
        told = f"loss {mean:.4g} ({', '.join(f'{name} {float(term):.4g}' for name, term in terms.items())})"
        if not math.isfinite(mean):
            raise EngineError(f"step {self.done + 1}: {told} is not finite; {ADVICE}")
        self._optimizer.step()
        self.done, self._last = self.done + 1, batch
        return told, stopping

    def _loss(self, batch: dict[str, Any]) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        device, grid = self._group.device, self.student.shape.grid
        image_B3SS = batch["image"].to(device, non_blocking=True)
        with torch.autocast(device.type, torch.bfloat16, enabled=self.precision == "bfloat16"):
            found = self._model(image_B3SS)
        targets = {
            name: {output: y_BTk.to(device, non_blocking=True) for output, y_BTk in outputs.items()}
            for name, outputs in batch["targets"].items()
        }
        loss, terms = self._objective(
            found, self._cached.on_grid(targets, grid), self._cached.counts(batch["rows"], grid, device)
        )
        return loss, terms


def rate(step: int, train: Train) -> float:
    """The learning rate of a step, counted from 0, as a part of the highest."""
    if step < train.warmup:
        return (step + 1) / (train.warmup + 1)
    return 0.5 * (1 + math.cos(math.pi * (step - train.warmup) / (train.steps - train.warmup)))


def precision(train: Train, device: torch.device) -> str:
    """What `auto` means on a device."""
    if train.precision != "auto":
        return train.precision
    return "bfloat16" if device.type == "cuda" and torch.cuda.is_bf16_supported() else "float32"
