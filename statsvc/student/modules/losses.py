"""What the student minimizes. All in float32, under autocast and for every dtype.

Suffixes: B = rows, T = tokens, k = channels of a target; *B and *T may be any axes, or none: [..., k].

student and target have one shape, [..., k]. mask is bool, [B] or [B, T] (the first axes of [...]), True where a token
counts: losses are means over the tokens that count. Where none does a loss is 0 with a gradient of 0, and what the
other tokens hold, NaN too, reaches neither. All raise PlanError for shapes that do not fit; none waits for a device.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import torch
from torch import distributed
from torch.nn import functional

from statsvc.errors import PlanError
from statsvc.student.modules.float32 import Float32Module

Mask = torch.Tensor | None


def mse(student: torch.Tensor, target: torch.Tensor, mask: Mask = None) -> torch.Tensor:
    """Mean of (student - target)^2 over channels and tokens. Source: arXiv:2410.01680, eq. 1."""
    return _mean(_mse, student, target, mask)


def cosine(student: torch.Tensor, target: torch.Tensor, mask: Mask = None) -> torch.Tensor:
    """Mean of 1 - cos(student, target) over tokens; a zero vector has cosine 0 with every other.

    The gradient there is finite, but as large as 1e8 / tokens: a head that starts at zero wants another loss.

    Source: arXiv:2410.01680, eq. 2.
    """
    return _mean(_cosine, student, target, mask)


def hybrid_smooth_l1(student: torch.Tensor, target: torch.Tensor, mask: Mask = None, beta: float = 0.9) -> torch.Tensor:
    """beta * cosine + (1 - beta) * Smooth-L1, which turns from square to linear at a difference of 1.

    Source: arXiv:2410.01680, eq. 3.
    """
    return beta * _mean(_cosine, student, target, mask) + (1 - beta) * _mean(_smooth_l1, student, target, mask)


def hybrid_mse(student: torch.Tensor, target: torch.Tensor, mask: Mask = None, beta: float = 0.9) -> torch.Tensor:
    """beta * cosine + (1 - beta) * mse. Source: arXiv:2410.01680, eq. 4."""
    return beta * _mean(_cosine, student, target, mask) + (1 - beta) * _mean(_mse, student, target, mask)


# By the names that settings use.
LOSSES: dict[str, Callable[..., torch.Tensor]] = {
    "mse": mse,
    "cosine": cosine,
    "hybrid-mse": hybrid_mse,
    "hybrid-smooth-l1": hybrid_smooth_l1,
}


def _mse(student_BTk: torch.Tensor, target_BTk: torch.Tensor) -> torch.Tensor:
    return (student_BTk - target_BTk).square().mean(-1)


def _smooth_l1(student_BTk: torch.Tensor, target_BTk: torch.Tensor) -> torch.Tensor:
    return functional.smooth_l1_loss(student_BTk, target_BTk, reduction="none").mean(-1)


def _cosine(student_BTk: torch.Tensor, target_BTk: torch.Tensor) -> torch.Tensor:
    return 1 - functional.cosine_similarity(student_BTk, target_BTk, dim=-1)


def _mean(
    per_token: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    student: torch.Tensor,
    target: torch.Tensor,
    mask: Mask,
) -> torch.Tensor:
    """Over the tokens that count."""
    if student.shape != target.shape or not student.ndim:
        raise PlanError(
            f"student and target have one shape, [..., k]; got {tuple(student.shape)} and {tuple(target.shape)}: "
            "`resample` brings targets to the student's grid"
        )
    student, target = student.float(), target.float()
    if mask is None:
        loss = per_token(student, target)
        return loss.sum() / max(loss.numel(), 1)
    axes = student.shape[:-1]
    if mask.dtype != torch.bool or mask.shape != axes[: mask.ndim]:
        raise PlanError(
            f"a mask is bool, True where a token counts, with the first axes of {tuple(axes)}; got {mask.dtype} "
            f"{tuple(mask.shape)}: compare or reshape it"
        )
    mask = mask[(...,) + (None,) * (len(axes) - mask.ndim)].expand(axes)
    # Out before the arithmetic: the gradient of what is taken out after it is 0 * NaN. Chosen, not indexed, so that
    # shapes do not depend on numbers and a GPU does not wait.
    kept = mask[..., None]
    loss = per_token(torch.where(kept, student, 0), torch.where(kept, target, 0))
    return torch.where(mask, loss, 0).sum() / mask.sum().clamp(min=1)


class AdaLoss(Float32Module):
    """Adds up named losses, each divided by an exponential moving average of itself: all count alike, whatever their
    scale.

    The average of a term starts at its first value, and moves only in training mode. Terms that are 0, as where a mask
    left nothing, not finite, or not there leave their average as it is. With torch.distributed initialized, all ranks
    use the mean of those ranks whose term counts; all of them must call. The averages are in the state dict.

    names  of all terms, in any order
    decay  of the average per call: 0.99 remembers about 100 of them

    Source: arXiv:2410.01680, A.8.1. Raises PlanError for names that are not there.
    """

    def __init__(self, names: Iterable[str], decay: float = 0.99) -> None:
        super().__init__()
        self.names, self.decay = sorted(set(names)), decay
        if not 0 <= decay < 1 or not self.names:
            raise PlanError(f"AdaLoss averages at least one term with a decay in [0, 1); got {self.names}, {decay}")
        # One buffer each, so that a state dict shows whose it is. torch allows no dots in their names.
        self._average_names = [f"average {name.replace('.', '/')}" for name in self.names]
        for average_name in self._average_names:
            self.register_buffer(average_name, torch.zeros(()))

    def forward(self, terms: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """float32 scalar from scalars: the sum of term / average over those that are there."""
        if wrong := [name for name, term in terms.items() if name not in self.names or term.ndim]:
            raise PlanError(
                f"terms are scalars named at the start, {', '.join(self.names)}; got {', '.join(wrong)}, "
                "unknown or not scalar: name them all when AdaLoss is made, and take their means"
            )
        average_n = torch.stack([self.get_buffer(name) for name in self._average_names])
        term_n = torch.stack([terms.get(name, average_n.new_zeros(())).float() for name in self.names])
        if self.training:
            average_n = self._moved(average_n, term_n.detach())
            for name, average in zip(self._average_names, average_n, strict=True):
                self.get_buffer(name).copy_(average)
        return (term_n / torch.where(average_n > 0, average_n, 1)).sum()

    def _moved(self, average_n: torch.Tensor, term_n: torch.Tensor) -> torch.Tensor:
        counts_n = torch.isfinite(term_n) & (term_n > 0)
        sums_2n = torch.stack([torch.where(counts_n, term_n, 0), counts_n.float()])
        if distributed.is_available() and distributed.is_initialized():
            distributed.all_reduce(sums_2n)
        mean_n = sums_2n[0] / sums_2n[1].clamp(min=1)
        moved_n = torch.where(average_n > 0, self.decay * average_n + (1 - self.decay) * mean_n, mean_n)
        return torch.where(sums_2n[1] > 0, moved_n, average_n)
