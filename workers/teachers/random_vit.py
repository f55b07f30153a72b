"""A real architecture of the transformers library with seeded random weights: for the demo and for tests.

`model` names the architecture (`dinov2`, `siglip_vision_model`, ...), `options` the fields of its config, and besides
`seed` and `scale`, a factor on the outputs: trained teachers differ in scale as much as they please.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from statsvc.config import nearest
from statsvc.digests import canonical_json, sha256
from statsvc.errors import PlanError
from statsvc.plan import Teacher
from workers.teachers.base import Features, Resolved, chosen_preprocessing, chosen_taps
from workers.teachers.transformers import HALF, TAPS

if TYPE_CHECKING:
    import torch

PREPROCESSING = {"interpolation": "bicubic", "mean": HALF[0], "std": HALF[1]}
RECIPE = 1  # enters the digest; raise it whenever other weights come out


def resolve(name: str, plan: Teacher) -> Resolved:
    """The digest is over the recipe: the weights follow from it. Raises PlanError."""
    if plan.size is None:
        raise PlanError(f"teachers.{name}.size is missing; random weights do not say which size they were trained at")
    return Resolved(
        plan=plan,
        weights=sha256(canonical_json({"recipe": RECIPE, "model": plan.model, "options": plan.options})),
        preprocessing=chosen_preprocessing(f"teachers.{name}", plan, PREPROCESSING, "nothing"),
        taps=chosen_taps(plan, TAPS),
    )


def load(resolved: Resolved) -> Features:
    """Weights are drawn by numpy, whose streams do not change with the version of torch."""
    import numpy as np
    import torch
    import transformers

    from workers.teachers.taps import TappedModel

    options = dict(resolved.plan.options)
    seed, scale = options.pop("seed", 0), options.pop("scale", 1)
    if not isinstance(seed, int) or isinstance(seed, bool) or seed < 0:
        raise PlanError(f"options.seed: {seed!r} is wrong; it must be a whole number from 0")
    if not isinstance(scale, (int, float)) or isinstance(scale, bool) or not scale:
        raise PlanError(f"options.scale: {scale!r} is wrong; it must be a number other than 0")
    factor = float(scale)
    try:
        known = transformers.AutoConfig.for_model(resolved.plan.model).to_dict()
        config = transformers.AutoConfig.for_model(resolved.plan.model, **options)
        auto_model: Any = transformers.AutoModel
        model = auto_model.from_config(config)
    except Exception as error:  # the library raises whatever it comes across in foreign values
        raise PlanError(
            f"{resolved.plan.model!r} with {options} is no architecture of transformers: {error}"
        ) from error
    for option in options:  # the library takes any word for one, and keeps it
        if option not in known:
            raise PlanError(f"options.{option} is no option of {resolved.plan.model!r}{nearest(option, known)}")
    rng = np.random.default_rng(seed)
    with torch.no_grad():
        for name, weight in sorted(model.named_parameters()):
            values = rng.standard_normal(tuple(weight.shape), np.float32)
            if "norm" in name and name.endswith("weight"):
                values = np.exp(0.5 * values)  # trained norms spread their channels over about a decade
            else:
                values *= 0.1 if weight.ndim == 1 else 1.5 * (weight[0].numel() ** -0.5)
            weight.copy_(torch.from_numpy(values))

    class Scaled(TappedModel):
        def forward(self, pixels_B3SS: torch.Tensor) -> dict[str, torch.Tensor]:
            return {output: x_BTD * factor for output, x_BTD in super().forward(pixels_B3SS).items()}

    return Scaled(model, resolved.taps, resolved.preprocessing.canvas)
