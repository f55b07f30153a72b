"""How a student is trained: student.yaml, one frozen model beside the plan's."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import (
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    field_validator,
    model_validator,
)

from statsvc.config import Section, one_of, read_section
from statsvc.student.modules.losses import LOSSES


class Model(Section):
    """The student: a ViT, by default of the size S/16."""

    size: PositiveInt = Field(224, description="side of the square view that the student sees, in pixels")
    patch: PositiveInt = Field(16, description="side of a patch, in pixels")
    dim: PositiveInt = 384
    depth: PositiveInt = 12
    heads: PositiveInt = 6
    mlp_ratio: PositiveFloat = 4.0

    @model_validator(mode="after")
    def _divides(self) -> Self:
        for whole, part in (("size", "patch"), ("dim", "heads")):
            large, small = getattr(self, whole), getattr(self, part)
            if large % small:
                raise ValueError(f"{whole}: {large} is no multiple of {part}: {small}; change one of them")
        return self


class Loss(Section):
    """What the student minimizes: the sum over teachers and outputs."""

    patches: Annotated[str, one_of(LOSSES)] = "mse"
    summary: Annotated[str, one_of(LOSSES)] = Field("cosine", description="cosine is the paper's")
    beta: NonNegativeFloat = Field(0.9, le=1, description="the part of the cosine in the hybrid losses")
    balance: Literal["none", "ada"] = Field("none", description="ada: each term is divided by its moving average")
    weights: dict[str, NonNegativeFloat] = Field(
        {}, description="teacher -> factor of its terms; 1 where none is given"
    )

    @model_validator(mode="after")
    def _balanced(self) -> Self:
        if self.weights and self.balance == "ada":
            raise ValueError(
                "weights cancel out with balance: ada, which divides each term by its size; drop one of them"
            )
        return self


class Train(Section):
    """AdamW; the learning rate rises for `warmup` steps, then falls along half a cosine to zero."""

    steps: PositiveInt = 100_000
    batch_size: PositiveInt = Field(256, description="rows of a step, over all processes")
    lr: PositiveFloat = 1e-3
    weight_decay: NonNegativeFloat = 0.02
    warmup: NonNegativeInt = Field(1000, description="steps")
    seed: int = Field(0, ge=0, description="of the first weights and of the order of the rows")
    precision: Literal["auto", "float32", "bfloat16"] = Field("auto", description="of the student's forward pass")
    workers: NonNegativeInt | Literal["auto"] = Field("auto", description="processes of each rank that read and decode")
    checkpoint_every: PositiveInt = Field(1000, description="steps")

    @model_validator(mode="after")
    def _warm(self) -> Self:
        if self.warmup >= self.steps:
            raise ValueError(f"warmup: {self.warmup} steps of {self.steps} leave none to train; set fewer")
        return self


class Recipe(Section):
    """Everything that `statsvc distill` needs to know beside the plan."""

    out: str = Field(min_length=1, description="the folder of checkpoint, report and student")
    model: Model = Model()
    loss: Loss = Loss()
    train: Train = Train()
    teachers: tuple[str, ...] | None = Field(None, min_length=1, description="null: all of the plan")
    holdout: NonNegativeInt = Field(1, description="dataset shards that are kept for the measurement, the last ones")

    @field_validator("teachers", mode="before")
    @classmethod
    def _list(cls, value: Any) -> Any:
        return tuple(value) if isinstance(value, list) else value


def read_recipe(path: Path) -> Recipe:
    """The recipe in a YAML file. Raises PlanError with one sentence per mistake: key, value, rule, way out."""
    return read_section(path, Recipe, "recipe", {})
