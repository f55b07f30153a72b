"""Cached targets as a torch dataset: whole batches of rows, with the images they belong to where they are wanted.

    dataset = TargetDataset("store", teachers=["dino"], batch_size=64, image_size=224)
    for epoch in range(epochs):
        dataset.set_epoch(epoch)
        for batch in DataLoader(dataset, batch_size=None, num_workers=4):
            batch["image"], batch["targets"]["dino"]["patches"]

Suffixes: B = rows of a batch, T = tokens, k = channels of a target, S = side of the image in pixels.
"""

from __future__ import annotations

import uuid
import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch.utils.data import IterableDataset, get_worker_info

from statsvc.dataset.decode import Resize
from statsvc.digests import canonical_json, sha256
from statsvc.errors import PlanError
from statsvc.plan import Data
from statsvc.storage.per_process import PerProcess
from statsvc.store.reader import Store, Targets
from statsvc.student.data.arguments import data_of, names_of, rank_of, shard_numbers, whole_number
from statsvc.student.data.batches import Contents, Reader
from statsvc.student.data.buffers import Batch, Ring, forget, lend, slabs
from statsvc.student.data.epoch_order import EpochOrder, Order, Tail
from statsvc.student.data.epoch_position import Position
from statsvc.student.data.images import Images, Pixels, Triple
from statsvc.student.data.rows import Missing, find_rows
from statsvc.student.data.selection import Chosen, choose_targets
from statsvc.student.data.source import StoreSource

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
OF_ORDER = ("batch_size", "window", "seed", "shuffle", "world_size", "tail")


class TargetDataset(IterableDataset[dict[str, Any]]):
    """Batches of rows, each row once in an epoch over all ranks and DataLoader workers.

    store         path or http://host:8000
    teachers      names; None: all of the store
    outputs       that each of them must have; None: all that each has
    cache_sets    by teacher, where it has several
    space         'normalized' targets, or features in the 'teacher' space
    method        by which features of a raw cache set are normalized
    batch_size    rows of a batch
    image_size    side of the student's image in pixels; None: no images. image_interpolation: as in a plan.
                  image_mean, image_std: of its pixels in [0, 1]; both None: uint8
    shards        where the dataset's tars lie: patterns as in a plan, or its section; None: as the run recorded it
    seed, shuffle the order is a function of (seed, epoch). window: rows that are shuffled together, at least
    rank, world_size
                  None: those of torch.distributed where it is initialized, else 0 of 1
    tail          'pad' repeats rows until all ranks have as many, 'drop' gives full batches only
    decode        False: codes and scales, or values, as they are stored, to be decoded on the device
    missing       a row that a teacher has no target of is an 'error', 'skip' leaves it out, 'mask' keeps it
    reuse_buffers a batch lies in memory that is used again once nothing refers to its arrays any more. Where there is
                  CUDA it is pinned, and used again four batches later at the earliest
    only          numbers of the dataset shards to use; None: all
    cache, cache_nbytes
                  folder and limit of the copies of remote shards; None: a folder of the user's cache
    token         of the service; None: STATSVC_TOKEN

    A batch: epoch, and step, its number in it; rows int64 [B]; keys, or without images their hashes in hex; padding
    bool [B], whether a row is a repeat of tail='pad'; image float32 or uint8 [B, 3, S, S]; targets {teacher: {output:
    float32 [B, T, k]}}, or in place of an array {'codes', 'scales'} or {'values'}. With missing='mask' also present
    {teacher: bool [B]}; targets that are not present are zero.

    Raises PlanError and NotFound for what cannot be, AbsentRow for missing='error', before anything is read;
    ShardChanged where an image is not that of its row, DamagedObject for damaged targets, while it is read.
    """

    def __init__(
        self,
        store: str | Path,
        *,
        teachers: Sequence[str] | None = None,
        outputs: Sequence[str] | None = ("patches",),
        cache_sets: Mapping[str, str] | None = None,
        space: str = "normalized",
        method: str | None = None,
        batch_size: int = 64,
        image_size: int | None = None,
        image_mean: Triple | None = IMAGENET_MEAN,
        image_std: Triple | None = IMAGENET_STD,
        image_interpolation: str = "bicubic",
        shards: str | Sequence[str] | Data | None = None,
        seed: int = 0,
        shuffle: bool = True,
        window: int = 16384,
        rank: int | None = None,
        world_size: int | None = None,
        tail: Tail = "pad",
        decode: bool = True,
        missing: Missing = "error",
        reuse_buffers: bool = False,
        only: Iterable[int] | None = None,
        cache: str | Path | None = None,
        cache_nbytes: int = 64 << 30,
        token: str | None = None,
    ) -> None:
        super().__init__()
        if space not in ("normalized", "teacher"):
            raise PlanError(f"space {space!r} is neither 'normalized' nor 'teacher'")
        rank, world_size = rank_of(rank, world_size)
        numbers = {
            "batch_size": whole_number("batch_size", batch_size, 1),
            "window": whole_number("window", window, 1),
            "seed": whole_number("seed", seed),
            "rank": whole_number("rank", rank, 0),
            "world_size": whole_number("world_size", world_size, 1),
        }
        wanted = None if only is None else shard_numbers(only)
        self._source = StoreSource(str(store), token, cache, whole_number("cache_nbytes", cache_nbytes, 1))
        self._contents = Contents(space if decode else None, missing == "mask")
        self._pixels: Pixels | None = None
        if image_size is not None:
            resize = Resize(whole_number("image_size", image_size, 1), image_interpolation)
            self._pixels = Pixels(resize, image_mean, image_std)
        self._reuse_buffers = bool(reuse_buffers)
        self._id, self._position = uuid.uuid4().hex, Position()
        opened = self._source.open()
        targets = choose_targets(opened, names_of(teachers), names_of(outputs), cache_sets or {}, method)
        # The store may grow; what is read stays what it was, also in workers that open it later.
        self._chosen = Chosen.of(targets, method)
        self._data = data_of(opened, shards) if self._pixels else None
        self._training_rows = find_rows(opened, targets, missing, wanted)
        self._order = Order(self._training_rows.count_S, **numbers, shuffle=bool(shuffle), tail=tail)
        self._identity = {
            "dataset_shards": sha256(canonical_json(self._training_rows.shards), self._training_rows.count_S)[:16],
            **{name: getattr(self._order, name) for name in OF_ORDER},
        }
        self._reader = PerProcess[Reader]()
        self._reader.get(lambda: self._read_with(opened, targets))
        weakref.finalize(self, forget, self._id)

    @property
    def targets(self) -> dict[str, dict[str, Targets]]:
        """What is read, by teacher and output: their transform, tokens and k."""
        return self._opened().targets

    @property
    def rows_per_epoch(self) -> int:
        """Of all ranks, repeats not included."""
        return self._order.rows if self._order.tail == "pad" else self._order.per_rank * self._order.world_size

    @property
    def epoch(self) -> int:
        """That the next iteration takes."""
        return self._position.epoch

    def counts(self) -> dict[str, Any]:
        """Rows to train on, those that each epoch drops, images that could not be decoded, rows that teachers lack."""
        return {
            "rows": self._order.rows,
            "dropped_per_epoch": self._order.rows - self.rows_per_epoch,
            "undecodable": self._training_rows.undecodable,
            "missing": dict(self._training_rows.missing),
        }

    def set_epoch(self, epoch: int) -> None:
        """What the next iteration takes, also that of persistent workers. Without it, an epoch is taken again.

        After load_state_dict, its own epoch goes on where it was.
        """
        self._position.set_epoch(whole_number("epoch", epoch, 0))

    def state_dict(self, batch: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """Where training stands, for every rank alike: after the batch that this object gave last, or after `batch`.

        With DataLoader workers, which give batches ahead of time, only `batch` tells what was used. Raises PlanError
        without it.
        """
        if batch is None:
            epoch, step = self._position.next
        elif not isinstance(batch, Mapping) or not {"epoch", "step"} <= set(batch):
            raise PlanError("state_dict takes a batch as this dataset gave it, with its epoch and step")
        else:
            epoch, step = batch["epoch"], batch["step"] + 1
        return {"epoch": epoch, "step": step, **self._identity}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """The next iteration begins with the batch after those that the state has seen, with any number of workers.

        Raises PlanError where the order of rows is another one now.
        """
        if not isinstance(state, Mapping):
            raise PlanError(f"a state is what state_dict() gave, not {type(state).__name__}")
        if differing := [name for name, value in self._identity.items() if state.get(name) != value]:
            values = "; ".join(f"{n} was {state.get(n)!r} and is {self._identity[n]!r}" for n in differing)
            raise PlanError(
                f"the state is of a dataset that gives other batches: {values}. Use those settings and that store, or "
                "begin an epoch anew with set_epoch"
            )
        epoch, step = (whole_number(name, state.get(name), 0) for name in ("epoch", "step"))
        if step > len(self):
            raise PlanError(f"the state is after {step} batches of an epoch, which has {len(self)}")
        self._position.resume(epoch, step)

    def __len__(self) -> int:
        """Batches of this rank in an epoch."""
        return self._order.batches

    def __iter__(self) -> Iterator[dict[str, Any]]:
        info = get_worker_info()
        worker, workers = (info.id, info.num_workers) if info else (0, 1)
        epoch, step = self._position.begin(worker)
        return self._batches(self._order.epoch(epoch), epoch, step, worker, workers)

    def _batches(
        self, order: EpochOrder, epoch: int, first: int, worker: int, workers: int
    ) -> Iterator[dict[str, Any]]:
        reader, window = self._opened(), None
        memory = slabs(reader.slab_nbytes(min(self._order.batch_size, self._order.per_rank)), reuse=self._reuse_buffers)
        ring = Ring(self._id, worker, uuid.uuid4().hex) if self._reuse_buffers else None
        for step in range(first, order.batches, workers):
            if window != (window := order.window_of(step)):
                reader.prefetch([*order.shards_of(window), *order.shards_of(window + 1)], worker, workers)
            slab = next(memory)
            batch = {**reader.read(order.batch(step), slab), "epoch": epoch, "step": step}
            self._position.passed(epoch, step + workers)
            if get_worker_info() is not None:
                batch = Batch(batch, slab, ring)
            elif self._reuse_buffers:
                lend(batch, slab.memory_X)
            yield batch
            del batch  # or it would be in use while the next one is put together

    def _opened(self) -> Reader:
        """What this process reads with: connections, threads and files do not pass a fork."""
        return self._reader.get(self._open_reader)

    def _open_reader(self) -> Reader:
        opened = self._source.open(known=True)
        return self._read_with(opened, self._chosen.targets(opened))

    def _read_with(self, store: Store, targets: dict[str, dict[str, Targets]]) -> Reader:
        images = None
        if self._pixels is not None and self._data is not None:
            images = Images(store, self._data, self._source.fetch_tar, self._pixels)
            images.check(self._training_rows.shards)
        return Reader(store, targets, self._training_rows, self._contents, images)
