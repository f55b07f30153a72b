"""Recipes: what is accepted, and one sentence with key, value and way out for everything that is not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from statsvc.student.distill.recipe import Recipe, read_recipe
from statsvc.student.modules.losses import LOSSES
from tests import ROOT
from tests.support.refusals import file_refuses, refuses


def read(text: str, folder: Path) -> Recipe:
    path = folder / "student.yaml"
    path.write_text(text)
    return read_recipe(path)


def test_recipe_must_name_a_folder_and_nothing_else(tmp_path: Path) -> None:
    recipe = read("out: student", tmp_path)
    assert recipe.model.size % recipe.model.patch == 0
    loss = recipe.loss
    assert (loss.patches, loss.summary, loss.beta, loss.balance) == ("mse", "cosine", 0.9, "none")
    assert (recipe.teachers, recipe.holdout, recipe.train.precision) == (None, 1, "auto")


def test_example_beside_the_demo_is_accepted() -> None:
    assert read_recipe(ROOT / "docker" / "plans" / "student.yaml").out == "demo/student"


@pytest.mark.parametrize("name", LOSSES)
def test_every_loss_can_be_chosen_for_either_output(name: str, tmp_path: Path) -> None:
    loss = read(f"out: x\nloss: {{patches: {name}, summary: {name}}}", tmp_path).loss
    assert (loss.patches, loss.summary) == (name, name)


@pytest.mark.parametrize(("text", "value"), [("1e-3", 1e-3), ("1.5E-4", 1.5e-4), ("2", 2.0), ("0.1", 0.1)])
def test_numbers_may_be_written_in_any_usual_way(text: str, value: float, tmp_path: Path) -> None:
    assert read(f"out: x\ntrain: {{lr: {text}}}", tmp_path).train.lr == value


def test_recipe_cannot_be_changed(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="frozen"):
        read("out: x", tmp_path).out = "y"  # type: ignore[misc]


WRONG = {
    "[out]": "a recipe is a mapping with the keys out, model, loss, train, teachers, holdout",
    "{}": "missing key out: add it",
    "out: ''": "out: '' is wrong; it must be a name",
    "out: x\nmodle: {}":
        "unknown key modle: {}; the keys here are out, model, loss, train, teachers, holdout (did you mean 'model'?)",
    "out: x\nmodel: {weight: 3}":
        "unknown key model.weight: 3; the keys here are size, patch, dim, depth, heads, mlp_ratio",
    "out: x\nloss: {balanse: ada}":
        "unknown key loss.balanse: 'ada'; the keys here are patches, summary, beta, balance, weights "
        "(did you mean 'balance'?)",
    "out: x\nmodel: {size: 100}": "model: size: 100 is no multiple of patch: 16; change one of them",
    "out: x\nmodel: {heads: 5}": "model: dim: 384 is no multiple of heads: 5; change one of them",
    "out: x\nloss: {patches: hybrid_mse}":
        "loss.patches: 'hybrid_mse' is not one of mse, cosine, hybrid-mse, hybrid-smooth-l1 "
        "(did you mean 'hybrid-mse'?)",
    "out: x\nloss: {beta: 1.5}": "loss.beta: 1.5 is wrong; it must be less than or equal to 1",
    "out: x\nloss: {balance: ada, weights: {dino: 2}}":
        "loss: weights cancel out with balance: ada, which divides each term by its size; drop one of them",
    "out: x\nloss: {weights: {dino: -1}}": "loss.weights.dino: -1 is wrong; it must be greater than or equal to 0",
    "out: x\ntrain: {steps: 1e5}": "train.steps: '1e5' is wrong; it must be a whole number",
    "out: x\ntrain: {lr: .nan}": "train.lr: nan is wrong; it must be a finite number",
    "out: x\ntrain: {steps: 10, warmup: 10}": "train: warmup: 10 steps of 10 leave none to train; set fewer",
    "out: x\ntrain: {workers: -1}": "train.workers: -1 is wrong; it must be greater than or equal to 0 or 'auto'",
    "out: x\nteachers: []": "teachers: [] is wrong; it must be at least one entry",
    "out: x\nteachers: dino": "teachers: 'dino' is wrong; it must be a list",
    "out: x\nholdout: half": "holdout: 'half' is wrong; it must be a whole number",
}  # fmt: skip


@pytest.mark.parametrize(("text", "sentence"), WRONG.items())
def test_mistakes_give_one_sentence(text: str, sentence: str, tmp_path: Path) -> None:
    file_refuses(sentence, text, tmp_path / "student.yaml", read_recipe)


def test_missing_recipe_is_named(tmp_path: Path) -> None:
    refuses("...cannot read the recipe ...none.yaml: No such file...", read_recipe, tmp_path / "none.yaml")


@pytest.mark.parametrize("section", ["model", "loss", "train"])
def test_every_section_may_be_left_out(section: str, tmp_path: Path) -> None:
    document: dict[str, Any] = read("out: x", tmp_path).model_dump()
    assert document[section] == getattr(read(f"out: x\n{section}: {{}}", tmp_path), section).model_dump()
