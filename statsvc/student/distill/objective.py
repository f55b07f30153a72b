"""What a student is trained on: one term for each teacher and output, added up.

Suffixes: B = rows, T = tokens, k = channels of a target.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from statsvc.student.distill.recipe import Loss
from statsvc.student.modules.losses import LOSSES, AdaLoss

Outputs = Mapping[str, Mapping[str, torch.Tensor]]


class Objective(nn.Module):
    """The sum over all terms, weighted or balanced as the recipe says; the state dict holds what balancing averages.

    outputs  the names of each teacher's outputs
    """

    def __init__(self, loss: Loss, outputs: Mapping[str, tuple[str, ...]]) -> None:
        super().__init__()
        self.loss = loss
        names = [f"{teacher}/{output}" for teacher in outputs for output in outputs[teacher]]
        self.balance = AdaLoss(names) if loss.balance == "ada" else None

    def forward(
        self, found: Outputs, targets: Outputs, counts: Mapping[str, torch.Tensor]
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """The scalar to minimize, and its terms by teacher/output before they are weighted, without gradient.

        found, targets  [B, T, k] for each teacher and output, of one shape
        counts          teacher -> bool [B, T]: the patches that count; all do where it has none
        """
        terms: dict[str, torch.Tensor] = {}
        for teacher, outputs in targets.items():
            for output, target_BTk in outputs.items():
                name = self.loss.patches if output == "patches" else self.loss.summary
                beta = {"beta": self.loss.beta} if name.startswith("hybrid") else {}
                mask = counts.get(teacher) if output == "patches" else None
                terms[f"{teacher}/{output}"] = LOSSES[name](found[teacher][output], target_BTk, mask, **beta)
        told = {name: term.detach() for name, term in terms.items()}
        if self.balance is not None:
            return self.balance(terms), told
        weights = self.loss.weights
        return torch.stack([term * weights.get(name.split("/")[0], 1.0) for name, term in terms.items()]).sum(), told
