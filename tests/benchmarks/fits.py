"""What a fit costs beside one eigendecomposition, and how even rotations are, with and without a Hadamard matrix.

Suffixes: D = channels, N = feature vectors.
"""

from __future__ import annotations

import time

import numpy as np
from numpy.typing import NDArray
from threadpoolctl import threadpool_limits

import statsvc
from statsvc.errors import NoHadamardMatrix
from tests.benchmarks.rows import Goal, Row, Table
from tests.benchmarks.timing import alternate

Floats = NDArray[np.float64]
# The first three are teachers' widths; of the others there is no Hadamard matrix at all.
WIDTHS = (768, 1024, 1280, 668, 770, 1001, 1023, 1366)
REPEATS = 3


def tables() -> list[Table]:
    return [time_of_fits(), *quality(), refit()]


def covariance(dim: int, seed: int = 0) -> Floats:
    """A spectrum over four decades, on axes that are not the channels."""
    mixing_DD = np.random.default_rng(seed).standard_normal((dim, dim)) * np.logspace(0, -2, dim)
    return mixing_DD @ mixing_DD.T / dim


def eigh(covariance_DD: Floats) -> tuple[Floats, Floats]:
    with threadpool_limits(1):
        values_D, vectors_DD = np.linalg.eigh(covariance_DD)
    return values_D, vectors_DD


def time_of_fits() -> Table:
    rows = []
    for dim, goal in ((1536, 3.0), (1366, None)):
        covariance_DD = covariance(dim)
        moments = statsvc.Moments(20_000, np.random.default_rng(1).standard_normal(dim), covariance_DD * 19_999)

        def decompose(matrix_DD: Floats = covariance_DD) -> None:
            eigh(matrix_DD)

        def fit(of: statsvc.Moments[Floats] = moments) -> None:
            statsvc.fit(of, "phi-s")

        seconds = alternate({"eigh": decompose, "fit": fit}, REPEATS)
        least = None if goal is None else Goal(1 / goal)
        rows.append(Row(f"PHI-S at D={dim}", seconds["fit"], "s", seconds["eigh"], "one eigh", "less", least))
    before = time.perf_counter()
    statsvc.hadamard(5120)
    rows.append(Row("Hadamard matrix of order 5120, first time", time.perf_counter() - before, "s"))
    return Table("Fitting, from moments to a finished transform, on one BLAS thread", tuple(rows))


def quality() -> list[Table]:
    """Are variances equal, and is every output made of all components alike?"""
    lines, errors, spreads = [], [], []
    for dim in WIDTHS:
        covariance_DD = covariance(dim)
        _, vectors_DD = eigh(covariance_DD)
        try:
            statsvc.hadamard(dim)
            kind = "yes"
        except NoHadamardMatrix:
            kind = "no"
        before = time.perf_counter()
        rotation_DD = statsvc.rotation(covariance_DD)
        seconds = time.perf_counter() - before
        random_DD = np.linalg.qr(np.random.default_rng(dim).standard_normal((dim, dim)))[0]
        spread_DD = (rotation_DD @ vectors_DD) ** 2
        participation_D = 1 / (dim * (spread_DD**2).sum(axis=1))
        errors.append(float(np.abs(variances(rotation_DD, covariance_DD) - 1).max()))
        spreads.append(float(spread_DD.max() * dim))
        lines.append(
            (
                str(dim),
                kind,
                f"{errors[-1]:.1e}",
                f"{variances(random_DD, covariance_DD).min():.2f} to {variances(random_DD, covariance_DD).max():.2f}",
                f"{np.abs(rotation_DD @ rotation_DD.T - np.eye(dim)).max():.1e}",
                f"{spreads[-1]:.2f}",
                f"{participation_D.min():.2f}",
                f"{seconds:.2f}",
            )
        )
    header = (
        "D",
        "Hadamard matrix",
        "variances differ by",
        "variances after a random rotation",
        "max abs R R^T - 1",
        "largest R^2 D",
        "least participation",
        "seconds",
    )
    note = (
        "R is taken on the principal axes: the largest R^2 D and the participation 1 / (D sum R^4) are 1 where every "
        "output holds the same part of every component, as with a Hadamard matrix."
    )
    worst = (
        Row("variances differ by", max(errors), goal=Goal(1e-12, at_most=True, of="ours")),
        Row("largest R^2 D", max(spreads), goal=Goal(2.3, at_most=True, of="ours")),
    )
    return [
        Table("Rotations that equalize all variances, with and without a Hadamard matrix", (), note, header, (*lines,)),
        Table("Rotations, the worst of these widths", worst),
    ]


def variances(rotation_DD: Floats, covariance_DD: Floats) -> Floats:
    """Of the outputs, as parts of their mean."""
    outputs_D: Floats = np.einsum("ij,ij->i", rotation_DD @ covariance_DD, rotation_DD)
    outputs_D /= outputs_D.mean()
    return outputs_D


def refit() -> Table:
    """New data of the same teacher: targets near the old ones, or targets that share nothing with them."""
    dim, count = 512, 20_000
    _, axes_DD = eigh(covariance(dim))
    # Levels far enough apart that axes are real and close enough that another sample turns them.
    root_DD = axes_DD * np.sqrt(np.geomspace(1, 1e-3, dim))
    samples = [np.random.default_rng(seed).standard_normal((count, dim)) @ root_DD.T for seed in (1, 2)]
    old, new = (statsvc.Moments.of(x_ND) for x_ND in samples)
    first = statsvc.fit(old, "phi-s")
    fresh, near = statsvc.fit(new, "phi-s"), statsvc.fit(new, "phi-s", near=first)

    def cosine(to: statsvc.Transform) -> float:
        a_ND, b_ND = first.apply(samples[1]), to.apply(samples[1])
        return float(np.mean((a_ND * b_ND).sum(1) / np.linalg.norm(a_ND, axis=1) / np.linalg.norm(b_ND, axis=1)))

    uneven = float(np.abs(variances(near.matrix, new.covariance()) - 1).max())
    return Table(
        f"Refitting on another sample of {count} tokens, D={dim}",
        (
            Row("cosine of new targets to the old ones, near=old", cosine(near), goal=Goal(0.997, of="ours")),
            Row("the same of a fresh fit", cosine(fresh)),
            Row("variances of the new targets differ by", uneven, "", goal=Goal(1e-12, at_most=True, of="ours")),
        ),
    )
