"""How well a student matches its teachers: squared error, and how evenly errors spread over channels.

Suffixes: B = rows, T = tokens, N = tokens of all rows, D = channels of the teacher, k = channels of a target.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional

from statsvc.errors import Interrupted
from statsvc.numerics.transform import Transform
from statsvc.progress import Bar
from statsvc.student.data.dataset import TargetDataset
from statsvc.student.distill.distributed import Processes
from statsvc.student.distill.targets import Cached
from statsvc.student.distill.vit import Student


class Matching:
    """Sums over the tokens of one output, for errors in the teacher's space and in the normalized one.

    Sums of several processes add up. transform says what normalized means; without one both spaces are the teacher's.
    Source: arXiv:2410.01680, Tables 3 and 5.
    """

    def __init__(self, dim: int, transform: Transform | None, device: torch.device) -> None:
        self._matrix_kD = None
        if transform is not None:
            self._matrix_kD = torch.tensor(transform.matrix, dtype=torch.float32, device=device)
        rank = dim if transform is None else transform.rank
        widths = {"tokens": 1, "cosine": 1, "x": dim, "x^2": dim, "e": dim, "e^2": dim, "n": rank, "n^2": rank}
        # On the CPU: not every device has float64.
        self.sums = {name: torch.zeros(width, dtype=torch.float64) for name, width in widths.items()}

    @torch.no_grad()
    def add(self, found_ND: torch.Tensor, true_ND: torch.Tensor) -> None:
        """float32 features: the student's, folded, and the teacher's."""
        error_ND = found_ND - true_ND
        # The map is affine, so errors need no mean.
        normalized_Nk = error_ND if self._matrix_kD is None else error_ND @ self._matrix_kD.T
        self.sums["tokens"] += len(true_ND)
        self.sums["cosine"] += functional.cosine_similarity(found_ND, true_ND, dim=-1).double().sum().cpu()
        for name, x in (("x", true_ND), ("e", error_ND), ("n", normalized_Nk)):
            self.sums[name] += x.double().sum(0).cpu()
            self.sums[f"{name}^2"] += x.double().square().sum(0).cpu()

    def report(self) -> dict[str, Any]:
        """mse: mean of the squared error over tokens and channels, in the teacher's space. unexplained: that, as a part
        of the features' mean variance: 1 for a student that always says the mean. cosine: mean over tokens.
        error_variance: over channels, of the variance of each one's error (ddof 1), in either space.
        """
        tokens = int(self.sums["tokens"])
        mse, variance_D = float((self.sums["e^2"] / tokens).mean()), self._variance("x")
        spaces = {"normalized": self._variance("n"), "original": self._variance("e")}
        return {
            "tokens": tokens,
            "mse": mse,
            "unexplained": mse / float(variance_D.mean()) if variance_D.any() else None,
            "cosine": float(self.sums["cosine"] / tokens),
            "error_variance": {
                space: {"min": float(each.min()), "max": float(each.max()), "range": float(each.max() - each.min())}
                for space, each in spaces.items()
            },
        }

    def _variance(self, name: str) -> torch.Tensor:
        tokens = self.sums["tokens"]
        scatter = self.sums[f"{name}^2"] - self.sums[name].square() / tokens
        return scatter.clamp(min=0) / (tokens - 1).clamp(min=1)


@torch.no_grad()
def match(student: Student, dataset: TargetDataset, cached: Cached, group: Processes, bar: Bar) -> dict[str, Any]:
    """{teacher: {output: figures}} over all rows of a dataset in the teacher's space; patches on the student's grid.

    Every process takes its part, and all get the same figures.
    """
    sums = {
        (name, output): Matching(len(transform.mean), transform, group.device)
        for name, each in cached.transforms.items()
        for output, transform in each.items()
    }
    for batch in dataset:
        if group.stopping:
            raise Interrupted("interrupted while measuring; the student is trained, and the same command measures it")
        own_B = ~batch["padding"]
        found = student(batch["image"].to(group.device))
        targets = cached.on_grid(batch["targets"], student.shape.grid)
        counts = cached.counts(batch["rows"], student.shape.grid, group.device)
        for (name, output), matching in sums.items():
            x_BTD, true_BTD = found[name][output], targets[name][output].to(group.device)
            counted_BT = own_B[:, None].to(group.device).expand(true_BTD.shape[:2])
            if output == "patches" and name in counts:
                counted_BT = counted_BT & counts[name]
            matching.add(x_BTD[counted_BT], true_BTD[counted_BT])
        bar.advance(1)
    for matching in sums.values():
        group.total(matching.sums.values())
    report: dict[str, Any] = {}
    for (name, output), matching in sums.items():
        report.setdefault(name, {})[output] = matching.report()
    return report
