"""What a user asks for: every key of a plan, its rule and what it means."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt, field_validator, model_validator

from statsvc.config import Section, one_of, read_section, show
from statsvc.numerics.codec import CODECS
from statsvc.numerics.normalizations import METHODS
from statsvc.numerics.views import RANDOM

NAME = re.compile(r"[a-z0-9][a-z0-9_-]{0,63}")
Fraction = Annotated[float, Field(gt=0, le=1)]
Ratio = Annotated[float, Field(ge=0.01, le=100)]
Probability = Annotated[float, Field(ge=0, le=1)]
OF_RANDOM_CROPS: dict[str, Any] = {"scale": [0.08, 1.0], "ratio": [3 / 4, 4 / 3], "flip": 0.5}
ENGINES = ("inline", "ray")
HOST_PORT = re.compile(r"([A-Za-z0-9._-]+|\[[0-9A-Fa-f:.]+\]):[0-9]{1,5}")
INTERPOLATIONS = ("nearest", "bilinear", "bicubic", "lanczos", "box", "hamming")


class Data(Section):
    """Which images."""

    shards: tuple[str, ...] = Field(
        min_length=1,
        description="tar files or folders of images: paths, globs, https:// or s3:// URLs, braces {000..099}, a list",
    )
    images: tuple[str, ...] = Field(
        ("jpg", "jpeg", "png", "webp"),
        min_length=1,
        description="extensions of images, from the first dot on, such as jpg or left.png",
    )
    rows_per_shard: PositiveInt | None = Field(
        None, description="samples kept for each dataset shard; null: as sizes.json beside them says, else scanned"
    )
    images_per_shard: PositiveInt = Field(1000, description="samples of each dataset shard that a folder is cut into")

    @field_validator("shards", "images", mode="before")
    @classmethod
    def _list(cls, value: Any) -> Any:
        return tuple(value) if isinstance(value, list) else (value,) if isinstance(value, str) else value

    @field_validator("images")
    @classmethod
    def _extensions(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        extensions = tuple(extension.lower().removeprefix(".") for extension in value)
        if "" in extensions:
            raise ValueError(f"{show(value)} has an extension without letters; write it like jpg")
        return extensions


class Views(Section):
    """Which part of each image every teacher sees."""

    kind: Literal["center", "whole", "random-resized-crop"] = Field(
        "center",
        description="center: the largest centred square of the upright image; whole: all of it, padded to a square; "
        "random-resized-crop: a random part of it, stretched to a square",
    )
    per_image: PositiveInt = Field(1, le=256, description="views of each image; each has a row, and is measured")
    seed: int = Field(0, description="of random crops, and of the order in which dataset shards are measured")
    scale: tuple[Fraction, Fraction] | None = Field(
        None, description="least and largest area of a random crop, as a fraction of the image's; null: [0.08, 1]"
    )
    ratio: tuple[Ratio, Ratio] | None = Field(
        None, description="least and largest w / h of a random crop; null: [0.75, 1.3333333333333333]"
    )
    flip: Probability | None = Field(None, description="probability that a random crop is mirrored; null: 0.5")

    @model_validator(mode="before")
    @classmethod
    def _defaults(cls, value: Any) -> Any:
        if not isinstance(value, dict) or value.get("kind") != RANDOM:
            return value
        return value | {key: default for key, default in OF_RANDOM_CROPS.items() if value.get(key) is None}

    @field_validator("scale", "ratio", mode="before")
    @classmethod
    def _pair(cls, value: Any) -> Any:
        if value is None:
            return None
        if not (isinstance(value, list | tuple) and len(value) == 2):
            raise ValueError(f"{show(value)} is not a list of two numbers, the least and the largest")
        return tuple(value)

    @field_validator("scale", "ratio")
    @classmethod
    def _ascending(cls, value: tuple[float, float] | None) -> tuple[float, float] | None:
        if value is not None and value[0] > value[1]:
            raise ValueError(f"{show(list(value))} begins with the larger number; write the least first")
        return value

    @model_validator(mode="after")
    def _random(self) -> Self:
        if self.kind == RANDOM:
            return self
        if self.per_image > 1:
            raise ValueError(
                f"per_image: {self.per_image} is for kind: {RANDOM}, all {self.kind} views of an image are the same; "
                "remove it"
            )
        for key in OF_RANDOM_CROPS:
            if getattr(self, key) is not None:
                raise ValueError(f"{key} is for kind: {RANDOM}, not {self.kind}; remove it")
        return self

    def settings(self) -> dict[str, Any]:
        """As stores and fingerprints have them; of other kinds than random crops, what they always had."""
        return self.model_dump(mode="json", exclude_none=True)


class Teacher(Section):
    """One frozen model. What is null is taken from the model's own files."""

    source: str = Field(description="where the model comes from: transformers, timm, open_clip, python, export")
    model: str = Field(description="name, local folder, file, or package.module:function, as the source has it")
    revision: str | None = Field(None, description="commit of the hub repository")
    size: PositiveInt | None = Field(None, description="side of the square view as this teacher sees it, in pixels")
    pad: PositiveInt | None = Field(
        None, description="side of the canvas the view is placed on, unscaled, in pixels; only its patches are kept"
    )
    interpolation: Annotated[str, one_of(INTERPOLATIONS)] | None = None
    mean: tuple[float, float, float] | None = Field(None, description="of the pixels, in [0, 1]")
    std: tuple[PositiveFloat, PositiveFloat, PositiveFloat] | None = None
    precision: Literal["auto", "float32", "bfloat16", "float16"] = Field("auto", description="of the forward pass")
    taps: dict[Literal["patches", "summary"], str | None] = Field({}, description="output -> where the model gives it")
    trust_remote_code: bool = Field(False, description="run Python code that comes with the model")
    options: dict[str, int | float | str | bool] = Field({}, description="what only this source understands")

    @field_validator("taps")
    @classmethod
    def _some(cls, value: dict[str, str | None]) -> dict[str, str | None]:
        if len(value) == 2 and not any(value.values()):
            raise ValueError("every output is dropped; keep patches or summary")
        return value

    @field_validator("mean", "std", mode="before")
    @classmethod
    def _triple(cls, value: Any) -> Any:
        if value is not None and not (isinstance(value, list | tuple) and len(value) == 3):
            raise ValueError(f"{show(value)} is not a list of three numbers, for red, green and blue")
        return tuple(value) if isinstance(value, list) else value


class Statistics(Section):
    """How many images the normalization is estimated from."""

    stop: Literal["converged"] = Field("converged", description="stop when the output variances are known to 1%")
    max_images: PositiveInt = Field(100_000, description="stop here at the latest; each view counts as an image")
    images: PositiveInt | Literal["all"] | None = Field(None, description="this many instead, converged or not")
    tokens_per_image: PositiveInt | Annotated[dict[str, PositiveInt], Field(min_length=1)] | None = Field(
        None,
        description="patches of each view that are measured, drawn at random by its key; null: all. Or a mapping from "
        "patterns of dataset shards' names, such as coco-*.tar, to such numbers; the first that matches counts",
    )


class Whitening(Section):
    """How far pca, zca and hca may go; relative to the gain of phi-s, so without a unit."""

    # Not zero: behind a LayerNorm, as most teachers end in one, features have no variance in one direction.
    eigenvalue_floor: NonNegativeFloat = Field(
        1e-6, lt=1, description="smaller eigenvalues, as a fraction of their mean, are raised to this"
    )
    max_gain: float = Field(1000.0, ge=1, description="a method that multiplies any direction by more is refused")


class Targets(Section):
    """How targets are stored."""

    space: Literal["normalized", "teacher"] = Field(
        "normalized", description="teacher: features as the teacher gives them, to be normalized when they are read"
    )
    dtype: Annotated[str, one_of(CODECS)] = "int8"
    rank: PositiveInt | None = Field(None, description="channels of a phi-s target; null: all that the teacher has")

    @model_validator(mode="after")
    def _raw(self) -> Self:
        if self.space == "teacher" and not self.dtype.startswith("float"):
            raise ValueError(
                f"dtype {self.dtype} is for normalized targets; with space: teacher use float16, or float32 for "
                "features beyond 65504"
            )
        if self.space == "teacher" and self.rank is not None:
            raise ValueError(
                "rank is for normalized targets, features in the teacher's space keep all their channels; remove rank"
            )
        return self


class Engine(Section):
    """What runs the work. Nothing here changes a number but batch_size and, on the first run, cpus_per_worker."""

    kind: Annotated[str, one_of(ENGINES)] = Field(
        "inline",
        description="inline: one worker process per visible GPU, or one on the CPU; ray: workers on the nodes of a Ray "
        "cluster, one for each GPU, or as many as the CPUs allow",
    )
    address: str | None = Field(
        None,
        description="of the Ray cluster: local, a cluster of its own on this machine; auto, the one that this machine "
        "is a node of; or host:port of the head. null: local",
    )
    gpus: PositiveInt | Literal["all"] | None = Field(
        None, description="GPUs of the Ray cluster that are used at most; null: all, or none where it has none"
    )
    cpus_per_worker: PositiveInt | None = Field(
        None,
        description="CPUs for each worker, and torch threads of a new store; null: inline, all of the machine's; "
        "ray, 4 of them or as many as this machine has: more threads gain little, and each worker holds all teachers",
    )
    batch_size: PositiveInt | Literal["auto"] = "auto"
    decoders: PositiveInt | Literal["auto"] = Field("auto", description="decoder processes of each worker")

    @field_validator("address")
    @classmethod
    def _address(cls, value: str | None) -> str | None:
        if value is None or value in ("local", "auto") or HOST_PORT.fullmatch(value):
            return value
        if value.startswith("ray://"):
            raise ValueError(
                f"{show(value)} is for Ray Client, which has no part in a cluster; give host:port of the head without "
                "ray://, the port that `ray start --head --port` names (6379), and run on a node of the cluster"
            )
        raise ValueError(f"{show(value)} is wrong; it must be local, auto, or host:port of the head of a Ray cluster")

    @model_validator(mode="after")
    def _of_its_kind(self) -> Self:
        if self.kind == "inline" and self.address is not None:
            raise ValueError("address is for kind: ray, not inline; remove it, or set kind: ray")
        if self.kind == "inline" and self.gpus is not None:
            raise ValueError(
                "gpus is for kind: ray, inline uses every visible GPU; remove it, or set CUDA_VISIBLE_DEVICES"
            )
        return self


class Plan(Section):
    """Everything that `statsvc run` needs to know."""

    store: str = Field(min_length=1, description="the folder to write to")
    data: Data
    views: Views = Views()
    teachers: dict[str, Teacher] = Field(min_length=1)
    statistics: Statistics = Statistics()
    normalize: Annotated[str, one_of(METHODS)] = "phi-s"
    whitening: Whitening = Whitening()
    targets: Targets = Targets()
    engine: Engine = Engine()

    @field_validator("teachers")
    @classmethod
    def _names(cls, value: dict[str, Teacher]) -> dict[str, Teacher]:
        for name in value:
            if not NAME.fullmatch(name):
                raise ValueError(f"the name {show(name)} must be 1 to 64 of a-z, 0-9, _, -, and begin with a-z or 0-9")
        return value

    @model_validator(mode="after")
    def _rank(self) -> Self:
        if self.targets.rank is not None and self.normalize != "phi-s":
            raise ValueError(f"targets.rank is for normalize: phi-s, not {self.normalize}; remove it")
        return self


def read_plan(path: Path, store: str | None = None) -> Plan:
    """The plan in a YAML file, with another store than its own where one is given.

    Raises PlanError with one sentence per mistake: key, value, rule, way out.
    """
    return read_section(path, Plan, "plan", {} if store is None else {"store": store})
