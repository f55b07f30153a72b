"""Losses against their equations in float64, and the laws of masks; AdaLoss against a loop in float64.

Suffixes: B = rows, T = tokens, k = channels of a target.
"""

from __future__ import annotations

import copy
import multiprocessing
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import distributed, nn

from statsvc.errors import PlanError
from statsvc.student.modules.losses import LOSSES, AdaLoss, cosine, hybrid_mse, hybrid_smooth_l1, mse
from tests.student.modules.test_normalize import each_file

Float64 = NDArray[np.float64]

HYBRIDS = {"hybrid-mse": hybrid_mse, "hybrid-smooth-l1": hybrid_smooth_l1}
each_loss = pytest.mark.parametrize("name", LOSSES)
# Each loss is a mean of rounded terms of up to 3 or so; measured 1e-7.
CLOSE = 1e-6


def mse_of(student: Float64, target: Float64) -> Float64:
    distances: Float64 = ((student - target) ** 2).mean(axis=-1)
    return distances


def cosine_of(student: Float64, target: Float64) -> Float64:
    dot, norms = (student * target).sum(axis=-1), np.linalg.norm(student, axis=-1) * np.linalg.norm(target, axis=-1)
    distances: Float64 = 1 - dot / np.where(norms > 0, norms, 1)
    return distances


def smooth_l1_of(student: Float64, target: Float64) -> Float64:
    error = np.abs(student - target)
    distances: Float64 = np.where(error < 1, error**2 / 2, error - 0.5).mean(axis=-1)
    return distances


# arXiv:2410.01680, eq. 1 to 4, per token.
EQUATIONS: dict[str, Callable[[Float64, Float64], Float64]] = {
    "mse": mse_of,
    "cosine": cosine_of,
    "hybrid-mse": lambda student, target: 0.9 * cosine_of(student, target) + 0.1 * mse_of(student, target),
    "hybrid-smooth-l1": lambda student, target: 0.9 * cosine_of(student, target) + 0.1 * smooth_l1_of(student, target),
}


def pair(shape: tuple[int, ...] = (3, 7, 48), seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """A student that has learned half of its targets, which are normalized; one error in six is beyond 1."""
    rng = np.random.default_rng(seed)
    target = rng.standard_normal(shape)
    student = target + rng.standard_normal(shape) * 0.7
    return torch.from_numpy(student.astype(np.float32)), torch.from_numpy(target.astype(np.float32))


def numbers(*tensors: torch.Tensor) -> list[Float64]:
    return [tensor.double().numpy() for tensor in tensors]


def gradient(name: str, student: torch.Tensor, *others: torch.Tensor) -> torch.Tensor:
    student = student.clone().requires_grad_()
    (found,) = torch.autograd.grad(LOSSES[name](student, *others), student)
    return found


# Equations


@each_loss
@pytest.mark.parametrize("shape", [(48,), (5, 48), (3, 7, 48), (2, 3, 4, 48), (3, 7, 1)])
def test_a_loss_is_its_equation(name: str, shape: tuple[int, ...]) -> None:
    student, target = pair(shape)
    loss = LOSSES[name](student, target)
    assert (loss.dtype, loss.shape) == (torch.float32, ())
    assert abs(float(loss) - EQUATIONS[name](*numbers(student, target)).mean()) <= CLOSE


@pytest.mark.parametrize("name", HYBRIDS)
@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
def test_beta_weighs_direction_against_distance(name: str, beta: float) -> None:
    student, target = pair()
    distance = mse_of if name == "hybrid-mse" else smooth_l1_of
    expected = beta * cosine_of(*numbers(student, target)) + (1 - beta) * distance(*numbers(student, target))
    assert abs(float(HYBRIDS[name](student, target, beta=beta)) - expected.mean()) <= CLOSE


@each_loss
def test_gradients_are_those_of_the_equation_by_differences(name: str) -> None:
    student, target = pair((2, 3, 5))
    found = gradient(name, student, target).double().numpy()
    student_BTk, target_BTk = numbers(student, target)
    for place in np.ndindex(2, 3, 5):
        step_BTk = np.zeros((2, 3, 5))
        step_BTk[place] = 1e-5
        up, down = (EQUATIONS[name](student_BTk + sign * step_BTk, target_BTk).mean() for sign in (1, -1))
        assert abs(found[place] - (up - down) / 2e-5) <= 1e-6


@each_loss
def test_a_student_that_is_right_has_no_loss(name: str) -> None:
    _, target = pair()
    assert abs(float(LOSSES[name](target, target))) <= CLOSE


@given(st.floats(0.01, 100))
@settings(max_examples=20, deadline=None)
def test_cosine_sees_no_scale(scale: float) -> None:
    student, target = pair()
    assert abs(float(cosine(student * scale, target) - cosine(student, target))) <= CLOSE


def test_smooth_l1_turns_linear_at_a_difference_of_one() -> None:
    student, target = torch.tensor([0.5, 1.0, 3.0]), torch.zeros(3)
    assert float(hybrid_smooth_l1(student, target, beta=0)) == pytest.approx((0.125 + 0.5 + 2.5) / 3)


# Zero vectors


@each_loss
@pytest.mark.parametrize("zeros", [(True, False), (False, True), (True, True)])
def test_zero_vectors_have_a_finite_loss_and_gradient(name: str, zeros: tuple[bool, bool]) -> None:
    student, target = pair()
    student[0, 0] *= not zeros[0]
    target[0, 0] *= not zeros[1]
    assert abs(float(LOSSES[name](student, target)) - EQUATIONS[name](*numbers(student, target)).mean()) <= CLOSE
    assert gradient(name, student, target).isfinite().all()


# Masks


@each_loss
@settings(max_examples=15, deadline=None)
@given(data=st.data())
def test_a_mask_is_as_leaving_the_tokens_out(name: str, data: st.DataObject) -> None:
    student, target = pair()
    mask_BT = torch.tensor(data.draw(st.lists(st.booleans(), min_size=21, max_size=21).filter(any))).reshape(3, 7)
    target[~mask_BT] = torch.nan
    student[~mask_BT] = data.draw(st.sampled_from([torch.nan, torch.inf, 1e30, 0.0]))
    masked = LOSSES[name](student, target, mask_BT)
    assert abs(float(masked - LOSSES[name](student[mask_BT], target[mask_BT]))) <= CLOSE
    found_BTk = gradient(name, student, target, mask_BT)
    assert not found_BTk[~mask_BT].any()
    assert torch.allclose(found_BTk[mask_BT], gradient(name, student[mask_BT], target[mask_BT]), atol=1e-7)


@each_loss
def test_a_mask_of_rows_is_that_of_all_their_tokens(name: str) -> None:
    student, target = pair()
    mask_B = torch.tensor([True, False, True])
    rows = LOSSES[name](student, target, mask_B)
    assert torch.equal(rows, LOSSES[name](student, target, mask_B[:, None].expand(3, 7)))
    assert abs(float(rows - LOSSES[name](student[mask_B], target[mask_B]))) <= CLOSE
    student, target = pair((3, 48))
    assert abs(float(LOSSES[name](student, target, mask_B) - LOSSES[name](student[mask_B], target[mask_B]))) <= CLOSE


@each_loss
def test_a_mask_of_all_tokens_is_none(name: str) -> None:
    student, target = pair()
    full_BT = torch.ones(3, 7, dtype=torch.bool)
    assert abs(float(LOSSES[name](student, target, full_BT) - LOSSES[name](student, target))) <= CLOSE


@each_loss
def test_where_no_token_counts_loss_and_gradient_are_zero(name: str) -> None:
    student, target = pair()
    none_BT = torch.zeros(3, 7, dtype=torch.bool)
    assert float(LOSSES[name](student, target * torch.nan, none_BT)) == 0
    assert not gradient(name, student, target * torch.nan, none_BT).any()
    assert float(LOSSES[name](student[:0], target[:0])) == 0
    assert float(LOSSES[name](student[:0], target[:0], none_BT[:0])) == 0


@each_loss
def test_what_counts_and_is_not_a_number_shows(name: str) -> None:
    student, target = pair()
    target[1, 2, 3] = torch.nan
    assert LOSSES[name](student, target).isnan()
    assert LOSSES[name](student, target, torch.ones(3, dtype=torch.bool)).isnan()


# Precision


@each_loss
def test_autocast_and_low_precision_are_computed_in_float32(name: str) -> None:
    student, target = pair()
    mask_BT = torch.arange(21).reshape(3, 7) % 3 > 0
    expected = LOSSES[name](student, target, mask_BT)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(LOSSES[name](student, target, mask_BT), expected)
    low = LOSSES[name](student.bfloat16(), target, mask_BT)
    assert low.dtype == torch.float32
    assert torch.equal(low, LOSSES[name](student.bfloat16().float(), target, mask_BT))
    # 300^2 is beyond float16.
    assert LOSSES["mse"](torch.full((1, 4), 300.0).half(), torch.zeros(1, 4).half()) == 90000


@each_loss
def test_a_loss_compiles_to_one_graph(name: str) -> None:
    student, target = pair()
    mask_BT = torch.arange(21).reshape(3, 7) % 3 > 0
    compiled = torch.compile(LOSSES[name], backend="eager", fullgraph=True)
    assert torch.equal(compiled(student, target, mask_BT), LOSSES[name](student, target, mask_BT))


# Refusals


@each_loss
@pytest.mark.parametrize("shape", [(3, 7, 1), (7, 48), (3, 1, 48), (1, 7, 48), ()])
def test_shapes_that_would_be_broadcast_are_refused(name: str, shape: tuple[int, ...]) -> None:
    student, _ = pair()
    with pytest.raises(PlanError, match="one shape"):
        LOSSES[name](student, torch.ones(shape))


@each_loss
@pytest.mark.parametrize(
    "mask",
    [
        torch.ones(3, 7),
        torch.ones(3, 7, dtype=torch.uint8),
        torch.ones(7, dtype=torch.bool),
        torch.ones(3, 1, dtype=torch.bool),
        torch.ones(3, 7, 48, dtype=torch.bool),
    ],
)
def test_masks_that_do_not_fit_are_refused(name: str, mask: torch.Tensor) -> None:
    with pytest.raises(PlanError, match=r"a mask is bool.*first axes of \(3, 7\)"):
        LOSSES[name](*pair(), mask)


def test_a_scalar_is_no_vector() -> None:
    with pytest.raises(PlanError, match="one shape"):
        mse(torch.tensor(1.0), torch.tensor(1.0))


# AdaLoss

NAMES = ("sam.patches", "siglip/summary", "dfn clip")
Terms = dict[str, float]


def tensors(terms: Terms) -> dict[str, torch.Tensor]:
    return {name: torch.tensor(value) for name, value in terms.items()}


def steps(count: int, seed: int = 0) -> list[Terms]:
    """Losses of three scales that fall, one of them now and then missing."""
    rng, scales = np.random.default_rng(seed), (40.0, 1.0, 5e-4)
    drawn = [
        {name: float(scale * rng.uniform(0.5, 1.5) * 0.99**step) for name, scale in zip(NAMES, scales, strict=True)}
        for step in range(count)
    ]
    return [{name: value for name, value in terms.items() if rng.random() > 0.2} for terms in drawn]


def by_loop(all_terms: list[Terms], decay: float) -> list[float]:
    averages: Terms = {}
    sums = []
    for terms in all_terms:
        for name, value in terms.items():
            averages[name] = decay * averages[name] + (1 - decay) * value if name in averages else value
        sums.append(sum(value / averages[name] for name, value in terms.items()))
    return sums


@pytest.mark.parametrize("decay", [0.0, 0.9, 0.99])
def test_each_term_is_divided_by_its_moving_average(decay: float) -> None:
    ada = AdaLoss(NAMES, decay)
    said = [float(ada(tensors(terms))) for terms in steps(60)]
    # Up to 60 roundings of half an ulp each; measured 4e-7.
    assert np.abs(np.array(said) - by_loop(steps(60), decay)).max() <= 1e-5


def test_at_the_first_step_every_term_is_one() -> None:
    assert float(AdaLoss(NAMES)(tensors(dict(zip(NAMES, (40.0, 1.0, 5e-4), strict=True))))) == pytest.approx(3)


def test_gradients_flow_through_the_terms_alone() -> None:
    ada = AdaLoss(["a", "b"], decay=0.5)
    ada(tensors({"a": 4.0, "b": 0.5}))
    term = torch.tensor(2.0, requires_grad=True)
    (found,) = torch.autograd.grad(ada({"a": term, "b": torch.tensor(1.0)}), term)
    assert float(found) == pytest.approx(1 / 3)  # the average of 4 and 2


@each_file
def test_a_resumed_run_goes_on_to_the_bit(saved: Callable[..., dict[str, Any]]) -> None:
    ada = AdaLoss(NAMES)
    for terms in steps(20):
        ada(tensors(terms))
    resumed = AdaLoss(reversed(NAMES))  # in another order
    resumed.load_state_dict(saved(ada.state_dict()))
    for terms in steps(20, seed=1):
        assert torch.equal(resumed(tensors(terms)), ada(tensors(terms)))


def test_a_state_with_other_terms_does_not_load() -> None:
    with pytest.raises(RuntimeError, match="average sam/patches"):
        AdaLoss(["dino"]).load_state_dict(AdaLoss(NAMES).state_dict())


def test_outside_training_the_averages_rest() -> None:
    ada = AdaLoss(["a"], decay=0.5)
    assert float(ada.eval()(tensors({"a": 4.0}))) == 4  # none yet
    ada.train()(tensors({"a": 4.0}))
    before = copy.deepcopy(ada.state_dict())
    assert float(ada.eval()(tensors({"a": 8.0}))) == 2
    assert ada.state_dict() == before


@pytest.mark.parametrize("bad", [0.0, float("nan"), float("inf"), -1.0])
def test_terms_that_do_not_count_leave_their_average_as_it_is(bad: float) -> None:
    ada = AdaLoss(["a", "b"], decay=0.5)
    first = ada(tensors({"a": bad, "b": 2.0}))
    assert torch.equal(first, torch.tensor(1 + bad)) or first.isnan()
    ada(tensors({"a": 4.0, "b": 2.0}))
    ada(tensors({"a": bad, "b": 2.0}))
    assert ada.state_dict()["average a"] == 4
    assert float(ada(tensors({"b": 2.0}))) == 1


def test_casting_the_model_around_it_leaves_the_averages_in_float32() -> None:
    ada = AdaLoss(["a"])
    ada(tensors({"a": 1.001}))
    assert nn.ModuleList([ada]).bfloat16().state_dict()["0.average a"] == torch.tensor(1.001)
    assert ada({"a": torch.tensor(1.0, dtype=torch.bfloat16)}).dtype == torch.float32


def test_unknown_names_and_vectors_are_refused() -> None:
    with pytest.raises(PlanError, match=r"named at the start, dfn clip, sam\.patches, siglip/summary; got sam,"):
        AdaLoss(NAMES)(tensors({"sam": 1.0}))
    with pytest.raises(PlanError, match="got a, unknown or not scalar"):
        AdaLoss(["a"])({"a": torch.ones(2)})
    for names, decay in (([], 0.9), (["a"], 1.0), (["a"], float("nan"))):
        with pytest.raises(PlanError, match="at least one term"):
            AdaLoss(names, decay)


# Terms of two ranks at four steps; a missing one stands for a batch without that teacher.
RANKS: tuple[list[Terms], list[Terms]] = (
    [{"a": 2.0, "b": 1.0}, {"a": 4.0}, {"a": 1.0, "b": 0.0}, {}],
    [{"a": 4.0, "b": 3.0}, {"a": 2.0, "b": 4.0}, {"a": 3.0, "b": 0.0}, {"b": 2.0}],
)


def rank(number: int, folder: str) -> None:
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", f"file://{folder}/meet", rank=number, world_size=2)
    ada = AdaLoss(["a", "b"], decay=0.5)
    said = [float(ada(tensors(terms))) for terms in RANKS[number]]
    torch.save({"said": said, **ada.state_dict()}, f"{folder}/{number}.pt")
    distributed.destroy_process_group()


def test_all_ranks_divide_by_the_same_average(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=rank, args=(number, str(tmp_path))) for number in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0]
    # a: 3, then (3 + 3) / 2, then (3 + 2) / 2, which no rank moves at last.
    # b: 2, then (2 + 4) / 2 by the one rank that has it, then as it is, then (3 + 2) / 2.
    expected = ([2 / 3 + 1 / 2, 4 / 3, 1 / 2.5, 0], [4 / 3 + 3 / 2, 2 / 3 + 4 / 3, 3 / 2.5, 2 / 2.5])
    for number in range(2):
        found = torch.load(tmp_path / f"{number}.pt", weights_only=True)
        assert found["said"] == pytest.approx(expected[number])
        assert (float(found["average a"]), float(found["average b"])) == pytest.approx((2.5, 2.5))
