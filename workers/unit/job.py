"""What is asked of a worker, and what comes of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from statsvc.dataset.folder import FolderShard
from statsvc.numerics.views import CENTER
from statsvc.store.layout import Output


@dataclass(frozen=True, slots=True)
class TeacherJob:
    """What a worker must know about one teacher to do a unit; the rest stands in the store.

    cache_set         in the measure phase: the features are cached there in the same pass
    transforms        digest by output; an output without one is cached in the teacher's own space
    tokens_per_image  patches of each image that are measured; None: all
    """

    name: str
    fingerprint: str
    outputs: dict[str, Output]
    cache_set: str = ""
    dtype: str = ""
    transforms: dict[str, str] = field(default_factory=dict)
    tokens_per_image: int | None = None


@dataclass(frozen=True, slots=True)
class Unit:
    """The work of one dataset shard in one phase, for the teachers that have not done it.

    rows_per_shard  of the store: samples x views
    views           the settings of the views: the attribute of the store
    lease           token of the driver's lease: once it is another's, nothing is published any more
    """

    phase: str
    shard: int
    name: str  # of the dataset shard
    location: str | FolderShard
    teachers: tuple[TeacherJob, ...]
    images: tuple[str, ...]
    rows_per_shard: int
    batch_size: int
    views: Mapping[str, Any] = field(default_factory=lambda: CENTER)
    lease: str = ""

    @property
    def views_per_image(self) -> int:
        per_image: int = self.views["per_image"]
        return per_image


@dataclass(frozen=True, slots=True)
class Result:
    """A unit that is committed, or one that was given up for the reason in `problem`."""

    unit: Unit
    problem: str | None = None
