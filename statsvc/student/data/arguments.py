"""What callers of TargetDataset may say, checked and made into what it means. All raise PlanError."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch

from statsvc.errors import PlanError
from statsvc.plan import Data
from statsvc.store.reader import Store
from statsvc.student.data.source import recorded_data


def names_of(names: Sequence[str] | None) -> tuple[str, ...] | None:
    """A name alone counts as a list of one."""
    return (names,) if isinstance(names, str) else None if names is None else tuple(names)


def whole_number(name: str, value: Any, least: int | None = None) -> int:
    """An int, also of numpy; raises PlanError for anything else, and for less than `least`."""
    try:
        number = operator.index(value)
    except TypeError as error:
        raise PlanError(f"{name} must be a whole number, not {value!r}") from error
    if least is not None and number < least:
        raise PlanError(f"{name} must be at least {least}, not {number}")
    return number


def shard_numbers(only: Iterable[int]) -> list[int]:
    """Raises PlanError for what is no list of whole numbers."""
    if not isinstance(only, Iterable) or isinstance(only, str):
        raise PlanError(f"only={only!r}: give the numbers of dataset shards as a list")
    return [whole_number("a dataset shard in only=...", number, 0) for number in only]


def data_of(store: Store, shards: str | Sequence[str] | Data | None) -> Data:
    """Where the dataset's tars lie. Which files in them are the images is as the store has it."""
    if isinstance(shards, Data):
        return shards
    if shards is None:
        return recorded_data(store)
    if isinstance(shards, Mapping) or not all(isinstance(pattern, str) for pattern in shards):
        raise PlanError(f"shards={shards!r}: give patterns as data.shards of a plan, such as 'photos/*.tar'")
    return Data(shards=names_of(shards) or (), images=tuple(store.root.images))


def rank_of(rank: int | None, world_size: int | None) -> tuple[int, int]:
    """Rank and number of ranks; where neither is given, those of torch.distributed if it is initialized."""
    if (rank is None) != (world_size is None):
        raise PlanError(f"rank {rank}, world_size {world_size}: give both, or neither for those of torch.distributed")
    if rank is not None and world_size is not None:
        return rank, world_size
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_rank(), torch.distributed.get_world_size()
    return 0, 1
