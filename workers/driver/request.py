"""A plan with what it names, read once: its dataset shards, its teachers' files, its store."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from statsvc.dataset.expand import DatasetShard, expand
from statsvc.errors import StoreError
from statsvc.plan import Plan
from statsvc.storage import open_backend
from statsvc.storage.backend import Backend
from statsvc.storage.fence import FencedBackend
from statsvc.storage.lease import Lease
from workers.driver.checks import changed_shards, check, check_numbers
from workers.driver.run_file import RunFile
from workers.driver.sizes import told_samples
from workers.driver.store_state import StoreState
from workers.driver.worklist import Worklist
from workers.teachers import resolve
from workers.teachers.base import Resolved


@dataclass(frozen=True)
class Request:
    """What a run or a refit begins with.

    shards    the plan's dataset shards by name
    is_refit  other options of fitting are welcome
    fresh     teachers that are fitted afresh, whatever became of their fits
    told      samples of new dataset shards that are known without reading them; each is asked for once
    """

    plan: Plan
    backend: Backend
    shards: dict[str, DatasetShard]
    teachers: dict[str, Resolved]
    is_refit: bool = False
    fresh: tuple[str, ...] = ()
    told: dict[str, int | None] = field(default_factory=dict)

    @classmethod
    def read(cls, plan: Plan, *, is_refit: bool = False, fresh: tuple[str, ...] = ()) -> Request:
        """Raises PlanError for what is not there."""
        shards = {shard.name: shard for shard in expand(plan.data)}
        teachers = {name: resolve(name, teacher) for name, teacher in plan.teachers.items()}  # hashes the weights
        backend = open_backend(plan.store)
        _check_location(backend)
        return cls(plan, backend, shards, teachers, is_refit, fresh)

    def under(self, lease: Lease) -> Request:
        """The same with a store that is written only while the lease is held."""
        return replace(self, backend=FencedBackend(self.backend, lease.fence))

    def worklist(self, record: RunFile | None = None) -> Worklist:
        """The plan against the store as it is now, with every refusal of `checks`. Reads only."""
        state = StoreState.read(self.backend)
        settings = check(self.plan, self.shards, state, self.teachers, is_refit=self.is_refit, fresh=self.fresh)
        indexed = {entry.name for entry in state.index.values()}
        new = [shard for name, shard in self.shards.items() if name not in indexed]
        found = Worklist(
            self.plan,
            self.shards,
            state,
            settings,
            quarantine=(record or RunFile(self.backend)).quarantine,
            changed=changed_shards(self.shards, state.index),
            told=self._samples_told(new) if self.plan.data.rows_per_shard is None else {},
        )
        check_numbers(found)
        return found

    def _samples_told(self, new: list[DatasetShard]) -> dict[str, int]:
        unasked = [shard for shard in new if shard.name not in self.told]
        self.told.update(dict.fromkeys(shard.name for shard in unasked) | told_samples(unasked))
        return {shard.name: count for shard in new if (count := self.told[shard.name]) is not None}


def _check_location(backend: Backend) -> None:
    """Raises PlanError where no store is, nor can be."""
    try:
        if backend.exists():
            return
    except StoreError:
        backend.check()  # which knows what is wrong with a plan
        raise
    backend.check()
