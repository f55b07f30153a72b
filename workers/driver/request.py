"""A plan with what it names, read once: its dataset shards, its teachers' files, its store."""

from __future__ import annotations

from dataclasses import dataclass, replace

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
    """

    plan: Plan
    backend: Backend
    shards: dict[str, DatasetShard]
    teachers: dict[str, Resolved]
    is_refit: bool = False
    fresh: tuple[str, ...] = ()

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
            told={} if self.plan.data.rows_per_shard is not None else told_samples(new),
        )
        check_numbers(found)
        return found


def _check_location(backend: Backend) -> None:
    """Raises PlanError where no store is, nor can be."""
    try:
        if backend.exists():
            return
    except StoreError:
        backend.check()  # which knows what is wrong with a plan
        raise
    backend.check()
