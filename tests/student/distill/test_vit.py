"""The reference student: its shapes, its attention, its file, its folded heads, and how it is measured.

Suffixes: B = images, S = side in pixels, N = tokens, T = tokens of an output, D = channels of the teacher, k = channels
of a target.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import statsvc
from statsvc.errors import StoreError, TransformError
from statsvc.numerics.transform import Transform
from statsvc.student.distill.evaluate import Matching
from statsvc.student.distill.fold_heads import check_fold, fold
from statsvc.student.distill.objective import Objective
from statsvc.student.distill.recipe import Loss
from statsvc.student.distill.vit import Block, Shape, Student, load_student, student_bytes
from tests.support.features import teacher_features

# "keys" and "half" are attributes of torch's own modules.
OUTPUTS = {
    "keys": {"patches": (16, 12), "summary": (1, 8)},
    "half": {"patches": (4, 20)},
    "sam": {"summary": (2, 6), "patches": (9, 4)},
}
SHAPE = Shape(size=24, patch=8, dim=32, depth=2, heads=4, mlp_ratio=2.0, outputs=OUTPUTS)


def student(seed: int = 0) -> Student:
    """Weights as large as trained ones: what the first ones do would hide behind their smallness."""
    torch.manual_seed(seed)
    made = Student(SHAPE).eval()
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(torch.randn_like(parameter) / 5)
    return made


def images(count: int = 3) -> torch.Tensor:
    return torch.randn(count, 3, 24, 24, generator=torch.Generator().manual_seed(1))


def transforms(method: str = "phi-s") -> dict[str, dict[str, Transform]]:
    """Fitted to features with the scales of SAM, which is where float32 has most to lose."""
    return {
        teacher: {
            output: statsvc.fit(statsvc.Moments.of(teacher_features("sam", 400, k).astype(np.float64)), method)
            for output, (_, k) in outputs.items()
        }
        for teacher, outputs in OUTPUTS.items()
    }


# Shapes and attention


def test_patches_come_on_the_students_grid_and_summaries_with_their_own_tokens() -> None:
    found = student()(images())
    shapes = {name: {output: tuple(y.shape) for output, y in each.items()} for name, each in found.items()}
    assert shapes == {
        "keys": {"patches": (3, 9, 12), "summary": (3, 1, 8)},
        "half": {"patches": (3, 9, 20)},
        "sam": {"summary": (3, 2, 6), "patches": (3, 9, 4)},
    }


def test_a_block_is_the_pre_norm_layer_of_torch() -> None:
    torch.manual_seed(0)
    block, layer = Block(32, 4, 2.0).eval(), nn.TransformerEncoderLayer(
        32, 4, 64, dropout=0, activation="gelu", batch_first=True, norm_first=True
    ).train()  # in evaluation mode torch takes another path, in which gelu is another one  # fmt: skip
    with torch.no_grad():
        layer.self_attn.in_proj_weight.copy_(block.qkv.weight)
        layer.self_attn.in_proj_bias.copy_(block.qkv.bias.normal_())
        for theirs, ours in (
            (layer.self_attn.out_proj, block.projection), (layer.norm1, block.norm_attention),
            (layer.norm2, block.norm_mlp), (layer.linear1, block.mlp[0]), (layer.linear2, block.mlp[2]),
        ):  # fmt: skip
            assert isinstance(ours, nn.Linear | nn.LayerNorm)
            theirs.weight.copy_(ours.weight.normal_(std=0.3))
            theirs.bias.copy_(ours.bias.normal_(std=0.3))
    x_BNd = torch.randn(2, 7, 32)
    # Both in float32: some hundred roundings of values of about 3.
    torch.testing.assert_close(block(x_BNd), layer(x_BNd), rtol=0, atol=3 * 100 * 2**-24)


def test_each_summary_has_class_tokens_of_its_own_and_every_patch_a_place() -> None:
    made, image_B3SS = student(), images(1)
    before = made(image_B3SS)
    with torch.no_grad():
        made.heads["keys/summary"][1].bias.add_(1)  # type: ignore[index]
    after = made(image_B3SS)
    assert torch.equal(after["sam"]["summary"], before["sam"]["summary"])
    torch.testing.assert_close(after["keys"]["summary"], before["keys"]["summary"] + 1)
    assert not torch.equal(before["sam"]["summary"][:, 0], before["sam"]["summary"][:, 1])
    # Without places, an image of one colour would give the same nine tokens.
    plain_T = made(torch.ones_like(image_B3SS))["half"]["patches"][0].detach()
    assert float((plain_T[0] - plain_T[8]).abs().max()) > 1e-3


def test_a_student_may_have_no_summary() -> None:
    made = Student(replace(SHAPE, outputs={"half": OUTPUTS["half"]}))
    found = made(images())["half"]["patches"]
    found.sum().backward()
    assert all(parameter.grad is not None for parameter in made.parameters())


# The file


def test_a_student_comes_back_from_its_file_bit_for_bit(tmp_path: Path) -> None:
    made = student()
    (tmp_path / "student.safetensors").write_bytes(student_bytes(made, {"space": "teacher"}))
    loaded = load_student(tmp_path / "student.safetensors")
    assert loaded.shape == made.shape
    assert not loaded.training
    expected = made(images())
    for name, outputs in loaded(images()).items():
        for output, y in outputs.items():
            assert torch.equal(y, expected[name][output])
    assert student_bytes(loaded, {"space": "teacher"}) == student_bytes(made, {"space": "teacher"})


@pytest.mark.parametrize("damage", ["missing", "foreign", "cut", "other tensors"])
def test_what_is_no_student_is_refused(damage: str, tmp_path: Path) -> None:
    from safetensors.torch import save

    made = student()
    good = student_bytes(made, {})
    path = tmp_path / "x.safetensors"
    if damage != "missing":
        made.shape = replace(made.shape, dim=64)
        path.write_bytes(
            {"foreign": save({"w": torch.zeros(1)}), "cut": good[:-1], "other tensors": student_bytes(made, {})}[damage]
        )
    with pytest.raises(StoreError, match=r"not a student of `statsvc distill`"):
        load_student(path)


# Folding


@pytest.mark.parametrize("method", ["phi-s", "standardize", "zca"])
def test_a_folded_student_says_what_the_inverse_transform_makes_of_its_targets(method: str) -> None:
    made, by_teacher = student(), transforms(method)
    folded = fold(made, by_teacher)
    check_fold(made, folded, by_teacher, images())
    assert made.shape == SHAPE
    for name, outputs in folded(images()).items():
        for output, x_BTD in outputs.items():
            y_BTk = made(images())[name][output].detach().double().numpy()
            expected = by_teacher[name][output].invert(y_BTk)
            # float32 rounds sums of values of about 100 at 2^-24 each, some ten times.
            assert np.abs(x_BTD.detach().numpy() - expected).max() < 10 * 2**-24 * np.abs(expected).max() * 10


def test_a_folded_student_that_says_something_else_is_refused() -> None:
    made, by_teacher = student(), transforms()
    folded = fold(made, by_teacher)
    with torch.no_grad():
        head = folded.heads["sam/patches"]
        assert isinstance(head, nn.Sequential)
        assert isinstance(head[-1], nn.Linear)
        head[-1].bias[2] += 0.01  # of features of about 60
    with pytest.raises(TransformError, match=r"sam patches: the folded student is off by 0\.01"):
        check_fold(made, folded, by_teacher, images())


def test_a_head_that_is_not_finite_is_refused() -> None:
    made, by_teacher = student(), transforms()
    with torch.no_grad():
        made.places[0, 0, 0] = torch.nan
    with pytest.raises(TransformError, match="off by nan"):
        check_fold(made, fold(made, by_teacher), by_teacher, images())


# What it is trained on, and how it is measured


def test_terms_are_weighted_by_teacher_and_masked_where_patches_do_not_count() -> None:
    y = {
        "a": {"patches": torch.randn(2, 4, 3), "summary": torch.randn(2, 1, 3)},
        "b": {"patches": torch.randn(2, 4, 5)},
    }
    found = {name: {output: torch.randn_like(each) for output, each in outputs.items()} for name, outputs in y.items()}
    counts = {"a": torch.tensor([[True, True, False, False], [True, False, False, False]])}
    objective = Objective(Loss(weights={"a": 3.0}), {name: tuple(outputs) for name, outputs in y.items()})
    loss, terms = objective(found, y, counts)
    squared_BTk = (found["a"]["patches"] - y["a"]["patches"]).square()
    cosine = nn.functional.cosine_similarity(found["a"]["summary"], y["a"]["summary"], dim=-1)
    expected = {
        "a/patches": squared_BTk[counts["a"]].mean(),
        "a/summary": (1 - cosine).mean(),
        "b/patches": (found["b"]["patches"] - y["b"]["patches"]).square().mean(),
    }
    assert {name: float(term) for name, term in terms.items()} == pytest.approx(
        {name: float(term) for name, term in expected.items()}, rel=1e-5
    )
    total = 3 * (expected["a/patches"] + expected["a/summary"]) + expected["b/patches"]
    assert float(loss) == pytest.approx(float(total), rel=1e-5)


def test_beta_reaches_the_hybrid_losses() -> None:
    y = {"a": {"patches": torch.randn(2, 4, 3)}}
    found = {"a": {"patches": torch.randn(2, 4, 3)}}
    losses = {
        beta: float(Objective(Loss(patches="hybrid-mse", beta=beta), {"a": ("patches",)})(found, y, {})[0])
        for beta in (0.0, 1.0)
    }
    alone = {
        name: float(Objective(Loss(patches=name), {"a": ("patches",)})(found, y, {})[0]) for name in ("mse", "cosine")
    }
    assert losses == {0.0: pytest.approx(alone["mse"]), 1.0: pytest.approx(alone["cosine"])}


def test_ada_balances_terms_of_any_scale() -> None:
    y = {"a": {"patches": torch.randn(2, 4, 3)}, "b": {"patches": 1000 * torch.randn(2, 4, 3)}}
    found = {name: {"patches": torch.zeros(2, 4, 3)} for name in y}
    loss, _ = Objective(Loss(balance="ada"), {"a": ("patches",), "b": ("patches",)})(found, y, {})
    assert float(loss) == pytest.approx(2)  # each divided by its first value


@pytest.mark.parametrize("method", [None, "phi-s", "zca"])
def test_figures_are_those_of_numpy_in_float64_however_batches_and_processes_are_cut(method: str | None) -> None:
    true_ND = teacher_features("sam", 600, 16)
    rng = np.random.default_rng(2)
    found_ND = (true_ND + rng.standard_normal(true_ND.shape) * np.geomspace(0.1, 10, 16) + 3).astype(np.float32)
    transform = None if method is None else statsvc.fit(statsvc.Moments.of(true_ND.astype(np.float64)), method)
    parts = [Matching(16, transform, torch.device("cpu")) for _ in range(2)]  # of two processes
    for index, begin in enumerate(range(0, 600, 150)):
        window = slice(begin, begin + 150)
        parts[index % 2].add(torch.from_numpy(found_ND[window]), torch.from_numpy(true_ND[window]))
    for name, tensor in parts[0].sums.items():
        tensor += parts[1].sums[name]
    report = parts[0].report()

    x_ND, error_ND = true_ND.astype(np.float64), found_ND.astype(np.float64) - true_ND
    normalized_Nk = (
        error_ND if transform is None else transform.apply(found_ND.astype(np.float64)) - transform.apply(x_ND)
    )
    cosine = (
        (found_ND * x_ND).sum(1) / np.linalg.norm(found_ND.astype(np.float64), axis=1) / np.linalg.norm(x_ND, axis=1)
    )
    expected = {
        "tokens": 600,
        "mse": (error_ND**2).mean(),
        "unexplained": (error_ND**2).mean() / x_ND.var(0, ddof=1).mean(),
        "cosine": cosine.mean(),
    }
    assert {key: report[key] for key in expected} == pytest.approx(expected, rel=1e-5)
    for space, error in (("original", error_ND), ("normalized", normalized_Nk)):
        variance_D = error.var(0, ddof=1)
        low, high = variance_D.min(), variance_D.max()
        # Errors are taken in float32, of features of up to 100: 1e-5 each at most, beside errors of 0.1 and more.
        assert report["error_variance"][space] == pytest.approx(
            {"min": low, "max": high, "range": high - low}, rel=1e-3
        )


def test_a_teacher_that_never_varies_leaves_nothing_to_explain() -> None:
    matching = Matching(2, None, torch.device("cpu"))
    matching.add(torch.zeros(3, 2), torch.ones(3, 2))
    assert matching.report()["unexplained"] is None
    assert matching.report()["mse"] == 1


def test_documented_import_paths_name_one_function() -> None:
    from statsvc.student import load_student
    from statsvc.student.vit import load_student as documented

    assert load_student is documented
