"""Real architectures with weights that are drawn anew in every process, and are the same."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from typing import Any

import pytest
import torch

from statsvc.plan import Teacher
from tests.support.checkpoints import DINO
from tests.support.refusals import refuses
from tests.support.teachers import Keys, digest, images, load
from workers.teachers import SOURCES, resolve

RANDOM: Keys = {
    "source": "random-vit", "model": "dinov2", "size": 32, "options": {**DINO, "seed": 3, "scale": 2.5}
}  # fmt: skip


def options(**changes: Any) -> Keys:
    return RANDOM | {"options": RANDOM["options"] | changes}


def digest_of_weights() -> str:
    """Over all weights and the digest that stands for them."""
    found = resolve("dino", Teacher.model_validate(RANDOM))
    model: Any = SOURCES["random-vit"].load(found)
    weights = (weight.numpy().tobytes() for _, weight in sorted(model.state_dict().items()))
    return hashlib.sha256(found.weights.encode() + b"".join(weights)).hexdigest()


def test_weights_are_the_same_in_every_process() -> None:
    script = "from tests.workers.teachers.test_random_vit import digest_of_weights; print(digest_of_weights())"
    other = subprocess.run(
        [sys.executable, "-c", script], env={**os.environ, "PYTHONHASHSEED": "7"}, capture_output=True, text=True,
        check=True,
    )  # fmt: skip
    assert other.stdout.strip() == digest_of_weights()


def test_weights_do_not_depend_on_the_random_numbers_of_torch() -> None:
    torch.manual_seed(1)
    first = load(**RANDOM)(images(32))["patches"]
    torch.manual_seed(2)
    assert torch.equal(load(**RANDOM)(images(32))["patches"], first)


def test_same_images_give_the_same_bits() -> None:
    # Built from a config, a model begins in training mode, where half of this one would be dropped at random.
    teacher = load(**options(hidden_dropout_prob=0.5, drop_path_rate=0.5))
    first, second = teacher(images(32)), teacher(images(32))
    for output in ("patches", "summary"):
        assert torch.equal(first[output], second[output])
        assert not first[output].requires_grad


def test_another_seed_gives_other_weights_and_another_digest() -> None:
    first, second = load(**RANDOM), load(**options(seed=4))
    assert not torch.allclose(first(images(32))["patches"], second(images(32))["patches"], atol=0.1)
    others = (RANDOM, options(seed=4), options(scale=2.0), RANDOM | {"model": "dinov2_with_registers"})
    assert len({digest(**keys) for keys in others}) == 4


def test_scale_multiplies_every_output() -> None:
    one = load(**options(scale=1))(images(32))
    for scale in (2.5, 100, -1):
        scaled = load(**options(scale=scale))(images(32))
        for output in ("patches", "summary"):
            torch.testing.assert_close(scaled[output], one[output] * scale, rtol=1e-6, atol=0)


def test_channels_differ_in_scale_like_those_of_trained_teachers() -> None:
    std_D = load(**RANDOM)(images(32, 16))["patches"].flatten(0, 1).std(0)
    assert float(std_D.max() / std_D.min()) > 3


@pytest.mark.parametrize(
    ("keys", "sentence"),
    [
        ({"size": None}, "...teachers.teacher.size is missing..."),
        ({"model": "no-such-architecture"}, "...'no-such-architecture' ... is no architecture of transformers..."),
        ({"size": 5}, "...cannot take images of size 5..."),
        (options(hiden_size=32), "...options.hiden_size ...did you mean 'hidden_size'..."),
        (options(hidden_act="round"), "...'dinov2' with ... is no architecture of transformers..."),
        *((options(seed=value), f"...options.seed: {value} is wrong...") for value in (-1, 1.5, True)),
        *((options(scale=value), f"...options.scale: {value!r} is wrong...") for value in ("large", 0, True)),
    ],
    ids=str,
)
def test_wrong_options_are_refused(keys: Keys, sentence: str) -> None:
    refuses(sentence, load, **RANDOM | keys)
