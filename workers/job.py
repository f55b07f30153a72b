"""What is asked of a worker, and what comes of it."""

from __future__ import annotations

from dataclasses import dataclass, field

from statsvc.layout import Output


@dataclass(frozen=True, slots=True)
class TeacherJob:
    """What a worker must know about one teacher to do a unit; the rest stands in the store."""

    name: str
    fingerprint: str
    outputs: dict[str, Output]
    cache_set: str = ""
    dtype: str = ""
    transforms: dict[str, str] = field(default_factory=dict)  # digest by output


@dataclass(frozen=True, slots=True)
class Unit:
    """The work of one dataset shard in one phase, for the teachers that have not done it."""

    phase: str
    shard: int
    name: str  # of the dataset shard
    location: str
    teachers: tuple[TeacherJob, ...]
    images: tuple[str, ...]
    rows_per_shard: int
    batch_size: int


@dataclass(frozen=True, slots=True)
class Result:
    """A unit that is committed, or one that was given up for the reason in `problem`."""

    unit: Unit
    problem: str | None = None
