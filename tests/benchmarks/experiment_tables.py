"""What the small experiment found, in the shapes of the paper's Tables 3 and 5, and in sentences.

Suffixes: M = methods, S = seeds, E = teachers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tests.benchmarks.rows import Table

Floats = NDArray[np.float64]
BASE, OURS = "MSE", "PHI-S"
WHITENING = ("PCA-W", "ZCA", "HCA")
NORMALIZED = ("Global", "Standardize", "PHI-S", *WHITENING)  # what the paper's Table 5 compares
# Table 3 of the paper, ViT-B/16: MSE of teachers under plain MSE and under PHI-S.
PAPER = {
    "dfn-clip": (5.0883e-4, 4.72e-4),
    "siglip": (1.9598, 1.901),
    "dinov2": (1.0767, 0.8865),
    "sam": (6.5082, 8.333),
}


class Runs:
    """The figures of all trainings.

    Raises ValueError where not every method was run with every seed.
    """

    def __init__(self, runs: list[dict[str, Any]]) -> None:
        self.methods = list(dict.fromkeys(run["method"] for run in runs))
        self.seeds = sorted({run["seed"] for run in runs})
        self.teachers = list(runs[0]["teachers"])
        self._by = {(run["method"], run["seed"]): run["teachers"] for run in runs}
        if len(self._by) != len(self.methods) * len(self.seeds):
            raise ValueError("every method is run with every seed")

    def of(self, *keys: str) -> Floats:
        """[M, S, E]: one figure of every run, by its place in a teacher's report."""
        found = []
        for method in self.methods:
            for seed in self.seeds:
                for teacher in self.teachers:
                    value: Any = self._by[method, seed][teacher]
                    for key in keys:
                        value = value[key]
                    found.append(float(value))
        return np.array(found).reshape(len(self.methods), len(self.seeds), len(self.teachers))


def ranks(figure_MSE: Floats) -> Floats:
    """[M, S, E]: 1 for the method with the smallest figure, for each seed and teacher."""
    places: Floats = figure_MSE.argsort(axis=0).argsort(axis=0).astype(np.float64) + 1
    return places


def tables(runs: Runs, teachers: dict[str, dict[str, float]]) -> list[Table]:
    return [
        about(teachers),
        by_method(
            runs, "Squared error in the teacher's own space on held-out photographs (as the paper's Table 3)",
            runs.of("mse"), f"Mean and standard deviation over {len(runs.seeds)} seeds. The rank is the mean over "
            "teachers, with its deviation over seeds; 1 is best.",
        ),
        parts(runs),
        by_method(
            runs, "Range of the errors' variance over channels, in the teacher's own space (as the paper's Table 5)",
            runs.of("error_variance", "original", "range"), "Largest variance of a channel less the smallest.",
        ),
        normalized(runs),
    ]  # fmt: skip


def about(teachers: dict[str, dict[str, float]]) -> Table:
    header = (
        "teacher", "D", "global mean, std", "means of channels", "std of channels", "alpha, global", "alpha, PHI-S",
        "effective rank / D",
    )  # fmt: skip
    lines = tuple(
        (
            name, f"{each['dim']:.0f}", f"{each['mean']:.4f}, {each['std']:.4f}",
            f"{each['least_mean']:.2f} to {each['largest_mean']:.2f}",
            f"{each['least_std']:.3g} to {each['largest_std']:.3g}", f"{each['alpha_global']:.2f}",
            f"{each['alpha_phi_s']:.2f}", f"{each['effective_rank'] / each['dim']:.2f}",
        )
        for name, each in teachers.items()
    )  # fmt: skip
    note = (
        "Real architectures with random weights, whose last norm gives channels the means and deviations that the "
        "paper reports of trained teachers (Tables 7 and 8), at a quarter of the widths. In Table 6 the effective rank "
        "is 0.85 of the width for DFN CLIP, 0.79 for SigLIP, 0.87 for DINOv2, 0.61 for SAM."
    )
    return Table("The teachers, on the photographs to train on", (), note, header, lines)


def by_method(runs: Runs, title: str, figure_MSE: Floats, note: str) -> Table:
    rank_MS = ranks(figure_MSE).mean(axis=2)
    lines = []
    for index, method in enumerate(runs.methods):
        cells = [spread(figure_MSE[index, :, teacher]) for teacher in range(len(runs.teachers))]
        lines.append((method, *cells, f"{rank_MS[index].mean():.2f} ± {deviation(rank_MS[index]):.2f}"))
    return Table(title, (), note, ("method", *runs.teachers, "average rank"), tuple(lines))


def parts(runs: Runs) -> Table:
    """The same as parts of the features' variance, which can be held against the paper's student."""
    figure_MSE = runs.of("unexplained")
    lines = tuple(
        (method, *(f"{figure_MSE[index, :, teacher].mean():.3f}" for teacher in range(len(runs.teachers))))
        for index, method in enumerate(runs.methods)
    )
    note = (
        "Squared error as a part of the features' variance: 1 for a student that always says the mean. The paper's "
        "PHI-S student leaves 0.81 of DFN CLIP, 0.80 of SigLIP, 0.51 of DINOv2, 0.37 of SAM (Tables 3 and 8)."
    )
    return Table("What students leave unexplained", (), note, ("method", *runs.teachers), lines)


def normalized(runs: Runs) -> Table:
    figure_MSE, raw_MSE = (runs.of("error_variance", space, "range") for space in ("normalized", "original"))
    lines = tuple(
        (method, *(spread(figure_MSE[index, :, teacher]) for teacher in range(len(runs.teachers))))
        for index, method in enumerate(runs.methods)
        if not np.array_equal(figure_MSE[index], raw_MSE[index])
    )
    note = "Of methods that have such a space; between methods these figures have different units."
    title = "Range of the errors' variance over channels, in the normalized space (as the paper's Table 5)"
    return Table(title, (), note, ("method", *runs.teachers), lines)


def verdict(runs: Runs) -> str:
    """What the experiment says of PHI-S, and where it disagrees with the paper."""
    mse_MSE, range_MSE = runs.of("mse"), runs.of("error_variance", "original", "range")
    base, ours = (runs.methods.index(name) for name in (BASE, OURS))
    gain_SE = 100 * (1 - mse_MSE[ours] / mse_MSE[base])
    gains, against = [], []
    for index, teacher in enumerate(runs.teachers):
        gain_S, (before, after) = gain_SE[:, index], PAPER[teacher]
        gains.append(
            f"{teacher} {gain_S.mean():+.1f}% ± {deviation(gain_S):.1f} (paper {100 * (1 - after / before):+.1f}%)"
        )
        if gain_S.mean() * (before - after) < 0:
            against.append(f"{teacher}, where the sign of the gain is the other one")
    normalized_MSE = runs.of("error_variance", "normalized", "range")
    best_E = np.array([mse_MSE[runs.methods.index(name)].mean(axis=0) for name in WHITENING]).min(axis=0)
    better_E = best_E < mse_MSE[ours].mean(axis=0)
    if better_E.any():
        names = ", ".join(name for name, better in zip(runs.teachers, better_E, strict=True) if better)
        against.append(
            f"the best whitening errs less than PHI-S for {names}; in Table 3 all err more, for every teacher"
        )
    said = {
        "PHI-S against raw MSE, squared error on held-out photographs, paired by seed": "falls by " + "; ".join(gains),
        "Average rank of the squared error": ordered(runs, mse_MSE, runs.methods),
        "Average rank of the range of the errors' variance over channels, in the teacher's own space": (
            f"{ordered(runs, range_MSE, runs.methods)}. Of raw MSE and the six normalizations alone: "
            f"{ordered(runs, range_MSE, (BASE, *NORMALIZED))}"
        ),
        "The same in the normalized space, of the six": (
            f"{ordered(runs, normalized_MSE, NORMALIZED)}; in Table 5 HCA and PHI-S have the smallest"
        ),
        "Against the paper": "; ".join(against) or "nothing of this",
    }
    return "\n".join(f"- **{what}**: {text}." for what, text in said.items())


def ordered(runs: Runs, figure_MSE: Floats, methods: Sequence[str]) -> str:
    """These methods by their average rank among themselves, the smallest first."""
    rank_M = ranks(figure_MSE[[runs.methods.index(name) for name in methods]]).mean(axis=(1, 2))
    return ", ".join(f"{methods[index]} {rank_M[index]:.2f}" for index in rank_M.argsort(kind="stable"))


def spread(figure_S: Floats) -> str:
    """Mean and standard deviation over seeds, with as many digits as the mean's four."""
    mean = figure_S.mean()
    return f"{mean:.4g} ± {deviation(figure_S):.1g}"


def deviation(figure_S: Floats) -> float:
    return float(figure_S.std(ddof=1)) if len(figure_S) > 1 else 0.0
