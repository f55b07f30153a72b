"""The small experiment's own parts: teachers with the statistics they are said to have, equal starts, ranks and tables.

Suffixes: M = methods, S = seeds, E = teachers, N = photographs, T = patches, D = channels.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

import statsvc
from statsvc.numerics.normalizations import METHODS as NORMALIZATIONS
from statsvc.student.distill.fold_heads import fold
from statsvc.student.distill.recipe import Train
from statsvc.student.distill.vit import Shape, Student
from tests.benchmarks import experiment, experiment_tables, experiment_teachers
from tests.benchmarks.experiment import METHODS, Photographs, head_map, order, start_at_the_mean, train_one
from tests.benchmarks.experiment_tables import PAPER, Runs, ranks, tables, verdict
from tests.benchmarks.experiment_teachers import SIZES, calibrated, effective_rank, features, photographs
from tests.support.features import TEACHERS, teacher_features

DIM = 12


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> Photographs:
    """Made-up features with the scales of real teachers, and images of noise."""
    monkeypatch.setattr(experiment, "TRAIN", Train(steps=3, batch_size=2, lr=1e-3, warmup=1))
    monkeypatch.setattr(experiment, "DIM", 16)
    monkeypatch.setattr(experiment, "DEPTH", 1)
    found = Photographs.__new__(Photographs)
    generator = torch.Generator().manual_seed(0)
    found.images = {part: torch.randn(4, 3, 112, 112, generator=generator) for part in ("train", "held-out")}
    x_ND = {name: torch.from_numpy(teacher_features(name, 4 * 64, DIM)) for name in SIZES}
    found.features = {
        part: {name: each.view(4, 64, DIM) for name, each in x_ND.items()} for part in ("train", "held-out")
    }
    moments = {name: statsvc.Moments.of(each.double().numpy()) for name, each in x_ND.items()}
    found.transforms = {
        name: {method: statsvc.fit(each, method, eigenvalue_floor=1e-6) for method in NORMALIZATIONS}
        for name, each in moments.items()
    }
    return found


@pytest.mark.parametrize("name", SIZES)
def test_a_teacher_has_the_statistics_of_the_trained_one(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(experiment_teachers, "CALIBRATION", 6)
    model = calibrated(name, 0)
    with torch.inference_mode():
        x_ND = features(name, model, photographs(SIZES[name][0])).flatten(0, 1).double()
    mean_D, std_D = x_ND.mean(0), x_ND.std(0)
    scales = TEACHERS[name]
    # The last norm is computed in float32, on values of up to a hundred deviations.
    for found, expected in (
        (mean_D.min(), scales.least_mean), (mean_D.max(), scales.largest_mean),
        (std_D.min(), scales.least_std), (std_D.max(), scales.largest_std),
        (std_D.square().mean().sqrt(), 1 / scales.alpha_phi_s),
    ):  # fmt: skip
        assert float(found) == pytest.approx(expected, rel=1e-3)
    assert x_ND.view(6, -1, x_ND.shape[1]).std(0).min() > 0  # other images, other features


def test_the_effective_rank_counts_directions() -> None:
    basis_ND = np.random.default_rng(0).standard_normal((2000, 5))
    assert effective_rank(basis_ND) == pytest.approx(5, rel=1e-2)
    assert effective_rank(np.hstack([basis_ND, basis_ND])) == pytest.approx(5, rel=1e-2)


@pytest.mark.parametrize("method", [each for each in METHODS if each.scaled], ids=lambda each: each.name)
def test_every_method_starts_at_the_teachers_mean_features(method: Any, small: Photographs) -> None:
    maps = {name: head_map(each, method) for name, each in small.transforms.items()}
    torch.manual_seed(0)
    student = Student(Shape(112, 14, 16, 1, 4, 4.0, {name: {"patches": (64, DIM)} for name in SIZES}))
    start_at_the_mean(student, maps, small)
    folded = fold(student, {name: {"patches": each} for name, each in maps.items()})
    with torch.no_grad():
        said = folded(small.images["train"])
    for name, x_NTD in small.features["train"].items():
        # First weights of 0.02 on 16 normalized channels move a target by some hundredths.
        error_D = said[name]["patches"].mean((0, 1)) - x_NTD.mean((0, 1))
        assert float(error_D.abs().max() / x_NTD.std((0, 1)).max()) < 0.3


def test_methods_differ_in_what_they_minimize_alone(small: Photographs, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, list[float]] = {}
    real = Student.forward

    def watched(self: Student, image: torch.Tensor) -> Any:
        seen.setdefault(current, []).append(float(image.sum()))
        return real(self, image)

    monkeypatch.setattr(Student, "forward", watched)
    found = {}
    for method in METHODS:
        current = method.name
        found[current] = train_one(small, method, 1)
    assert len({tuple(each) for each in seen.values()}) == 1
    assert len({each["siglip"]["mse"] for each in found.values()}) == len(METHODS)
    assert train_one(small, METHODS[0], 1) == found[METHODS[0].name]
    assert train_one(small, METHODS[0], 2) != found[METHODS[0].name]


def test_a_head_of_raw_features_is_scaled_by_one_number(small: Photographs) -> None:
    raw, plain = METHODS[0], METHODS[-1]
    transforms = small.transforms["sam"]
    alpha = transforms["global"].alpha
    assert alpha is not None
    np.testing.assert_allclose(head_map(transforms, raw).inverse, np.eye(DIM) / alpha)
    np.testing.assert_array_equal(head_map(transforms, plain).inverse, np.eye(DIM))
    assert head_map(transforms, METHODS[6]) is transforms["phi-s"]


def test_the_order_takes_every_row_once_an_epoch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(experiment, "TRAIN", Train(steps=10, batch_size=3, warmup=1))
    rows = order(10, 0)
    assert rows.shape == (10, 3)
    epochs = rows.flatten().view(3, 10).tolist()
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert epochs[0] != epochs[1]
    assert torch.equal(order(10, 0), rows)
    assert not torch.equal(order(10, 1), rows)


# Tables


def runs() -> list[dict[str, Any]]:
    """MSE and PHI-S of the paper's Table 3, with a spread of 1%, and a third method between them."""
    found = []
    for seed in (0, 1, 2):
        for method, place in (("MSE", 0.0), ("Other", 0.5), ("PHI-S", 1.0)):
            teachers = {}
            for name, (before, after) in PAPER.items():
                mse = (before + place * (after - before)) * (1 + 0.01 * (seed - 1))
                ranges = {"min": 0.0, "max": mse, "range": mse}
                normalized = ranges if method == "MSE" else {"min": 0.0, "max": 0.1, "range": 0.1}
                variances = {"normalized": normalized, "original": ranges}
                teachers[name] = {
                    "mse": mse,
                    "unexplained": 0.5,
                    "cosine": 0.9,
                    "tokens": 1,
                    "error_variance": variances,
                }
            found.append({"method": method, "seed": seed, "teachers": teachers})
    return found


def test_ranks_count_from_the_smallest() -> None:
    figure_MSE = np.array([[[3.0, 1.0]], [[1.0, 2.0]], [[2.0, 3.0]]])
    assert ranks(figure_MSE).tolist() == [[[3, 1]], [[1, 2]], [[2, 3]]]


def test_the_paper_agrees_with_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(experiment_tables, "NORMALIZED", ("PHI-S",))
    monkeypatch.setattr(experiment_tables, "WHITENING", ("MSE",))
    said = verdict(Runs(runs()))
    assert "dfn-clip +7.2% ± 0.0 (paper +7.2%)" in said
    assert "sam -28.0% ± 0.0 (paper -28.0%)" in said
    # First with three teachers, last with one of three methods.
    assert "**Average rank of the squared error**: PHI-S 1.50, Other 2.00, MSE 2.50." in said
    assert "of the six**: PHI-S 1.00;" in said
    # Plain MSE stands for whitening here, which errs less than PHI-S for SAM alone.
    against = "the best whitening errs less than PHI-S for sam; in Table 3 all err more, for every teacher"
    assert said.endswith(f"- **Against the paper**: {against}.")


def test_what_disagrees_with_the_paper_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(experiment_tables, "NORMALIZED", ("PHI-S",))
    monkeypatch.setattr(experiment_tables, "WHITENING", ("MSE",))
    turned = runs()
    for run in turned:
        if run["method"] == "PHI-S":
            run["teachers"]["dinov2"]["mse"] = 2.0
    assert "**Against the paper**: dinov2, where the sign of the gain is the other one;" in verdict(Runs(turned))


def test_tables_have_a_line_for_every_method_and_say_their_spread() -> None:
    about = {
        name: dict.fromkeys(
            ("dim", "mean", "std", "least_mean", "largest_mean", "least_std", "largest_std", "alpha_global",
             "alpha_phi_s", "effective_rank"), 1.0,
        )
        for name in TEACHERS
    }  # fmt: skip
    described, errors, unexplained, ranges, normalized = (table.grid() for table in tables(Runs(runs()), about))
    assert len(described) == 1 + len(TEACHERS)
    assert [line[0] for line in errors[1:]] == ["MSE", "Other", "PHI-S"]
    assert errors[1][1] == "0.0005088 ± 5e-06"
    assert errors[3][-1] == "1.50 ± 0.00"  # first with three teachers, last with one
    assert [line[0] for line in normalized[1:]] == ["Other", "PHI-S"]  # raw features have no other space
    assert len(unexplained) == len(ranges) == 4


def test_runs_that_lack_one_are_refused() -> None:
    with pytest.raises(ValueError, match="every method"):
        Runs(runs()[1:])
