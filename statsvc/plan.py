"""What a user asks for: one YAML file, one frozen model, one sentence per mistake."""

from __future__ import annotations

import difflib
import re
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeVar, get_args

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    NonNegativeFloat,
    PositiveFloat,
    PositiveInt,
    ValidationError,
    field_validator,
    model_validator,
)

from statsvc.codec import CODECS
from statsvc.document import read_document, show
from statsvc.errors import PlanError
from statsvc.normalizations import METHODS
from statsvc.views import RANDOM

NAME = re.compile(r"[a-z0-9][a-z0-9_-]{0,63}")
# What pydantic calls the rules that a plan can break, in the words of a plan.
RULES = {
    "int_type": "a whole number",
    "float_type": "a number",
    "finite_number": "a finite number",
    "string_type": "text (in quotes where YAML reads something else)",
    "bool_type": "true or false",
    "tuple_type": "a list",
    "dict_type": "a mapping",
    "model_type": "a mapping",
    "too_short": "at least one entry",
    "string_too_short": "a name",
}
# The last part of the place of a mistake, where a value may be of several types; what cannot be such a mistake.
UNION_MEMBERS = ("int", "float", "str", "bool", "constrained-int", "literal['all']", "literal['auto']", "[key]")
MAPPING = "dict[str,constrained-int]"
OF_SECTIONS = ("extra_forbidden", "missing", "model_type")
Fraction = Annotated[float, Field(gt=0, le=1)]
Ratio = Annotated[float, Field(ge=0.01, le=100)]
Probability = Annotated[float, Field(ge=0, le=1)]
OF_RANDOM_CROPS: dict[str, Any] = {"scale": [0.08, 1.0], "ratio": [3 / 4, 4 / 3], "flip": 0.5}
INTERPOLATIONS = ("nearest", "bilinear", "bicubic", "lanczos", "box", "hamming")


def one_of(table: Any) -> BeforeValidator:
    """A value that must be a key of a table, so that a new entry there is a new choice here."""

    def check(value: Any) -> Any:
        if not isinstance(value, str):
            raise ValueError(f"{show(value)} is not one of {', '.join(table)}")
        if value not in table:
            raise ValueError(f"{show(value)} is not one of {', '.join(table)}{nearest(value, table)}")
        return value

    return BeforeValidator(check)


def nearest(word: str, valid: Any) -> str:
    """A question that names the valid word nearest to a misspelt one, or nothing."""
    match = difflib.get_close_matches(word, list(valid), n=1)
    return f" (did you mean {match[0]!r}?)" if match else ""


class Section(BaseModel):
    """Strict: an unknown key or a value of another type is refused, never guessed."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


Document = TypeVar("Document", bound=Section)


class Data(Section):
    """Which images."""

    shards: tuple[str, ...] = Field(
        min_length=1,
        description="tar files or folders of images: paths, globs, https:// URLs, braces {000..099}, or a list",
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
    """What runs the work. Nothing here but batch_size changes a number."""

    kind: Literal["inline"] = Field("inline", description="one worker process per visible GPU, or one on the CPU")
    batch_size: PositiveInt | Literal["auto"] = "auto"
    decoders: PositiveInt | Literal["auto"] = Field("auto", description="decoder processes of each worker")


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


def read_section(path: Path, model: type[Document], name: str, changes: dict[str, Any]) -> Document:
    """What a YAML file holds as a model, with some keys changed; `name` is what users call such a file.

    Raises PlanError with one sentence per mistake: key, value, rule, way out.
    """
    document = read_document(path, name)
    if not isinstance(document, dict):
        raise PlanError(f"{path}: a {name} is a mapping with the keys {', '.join(model.model_fields)}")
    try:
        return model.model_validate(document | changes)
    except ValidationError as error:
        raise PlanError("\n".join(f"{path}: {sentence}" for sentence in _sentences(error, model, name))) from error


def _sentences(error: ValidationError, model: type[Section], name: str) -> list[str]:
    """One sentence for each wrong key: the value, the rule, the way out."""
    rules: dict[str, list[str]] = {}
    misspelt: set[str] = set()
    for mistake in error.errors():
        keys, value = [str(part) for part in mistake["loc"] if part != MAPPING] or [name], mistake["input"]
        if keys[-1] in UNION_MEMBERS and mistake["type"] not in OF_SECTIONS:
            keys.pop()
        key = ".".join(keys)
        match mistake["type"]:
            case "extra_forbidden":
                valid = _valid_keys(model, keys[:-1])
                misspelt.update(difflib.get_close_matches(keys[-1], valid, n=1))
                rules[f"unknown key {key}"] = [
                    f"{show(value)}; the keys here are {', '.join(valid)}{nearest(keys[-1], valid)}"
                ]
            case "missing":
                rules[f"missing key {key}"] = ["add it"]
            case "value_error":
                rules[key] = [f"{mistake['ctx']['error']}"]
            case _:
                rule = RULES.get(mistake["type"], mistake["msg"].removeprefix("Input should be "))
                rules[key] = [*rules[key], rule] if key in rules else [f"{show(value)} is wrong; it must be {rule}"]
    return [
        f"{key}: {' or '.join(parts)}"
        for key, parts in rules.items()
        if not (key.startswith("missing key") and re.split(r"[. ]", key)[-1] in misspelt)
    ]


def _valid_keys(model: type[Section], place: list[str]) -> list[str]:
    """The keys of the section at that place of a document."""
    found: Any = model
    for key in place:
        # Below a mapping, keys are the user's own, and all values are of one kind.
        found = found.model_fields[key].annotation if hasattr(found, "model_fields") else get_args(found)[1]
    return list(found.model_fields)
