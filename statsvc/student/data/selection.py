"""Which targets a dataset reads: chosen once, and found again in every process that opens the store."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from statsvc.errors import DamagedObject, NotFound, PlanError
from statsvc.store.reader import Store, Targets

ByOutput = dict[str, dict[str, Targets]]  # of each teacher


def choose_targets(
    store: Store,
    teachers: tuple[str, ...] | None,
    outputs: tuple[str, ...] | None,
    cache_sets: Mapping[str, str],
    method: str | None,
) -> ByOutput:
    """Of all teachers, with all that each has, where they are not named. Raises NotFound naming what there is."""
    if not isinstance(cache_sets, Mapping):
        raise PlanError(f"cache_sets={cache_sets!r}: give a mapping from teachers to cache sets")
    chosen = store.teachers() if teachers is None else teachers
    if not chosen:
        raise NotFound("there is no teacher to read: the store has none yet, or teachers=... names none")
    if unknown := set(cache_sets) - set(chosen):
        raise NotFound(f"cache_sets names {', '.join(sorted(unknown))}; the teachers are {', '.join(chosen)}")
    found = {}
    for name in chosen:
        teacher = store.teacher(name)
        wanted = tuple(teacher.outputs) if outputs is None else outputs
        if not wanted:
            raise NotFound(f"outputs=... names none; teacher {name} has {', '.join(teacher.outputs)}")
        found[name] = {output: teacher.targets(output, cache_sets.get(name), method) for output in wanted}
    return found


@dataclass(frozen=True)
class Chosen:
    """What was chosen once, to be found again however the store has grown: cache set and transform of each output."""

    sets: dict[str, dict[str, tuple[str, str | None]]]
    method: str | None

    @classmethod
    def of(cls, targets: ByOutput, method: str | None) -> Chosen:
        return cls(
            {name: {o: (t.set, t.transform_digest) for o, t in each.items()} for name, each in targets.items()}, method
        )

    def targets(self, store: Store) -> ByOutput:
        """Raises DamagedObject where they are no longer the same."""
        found: ByOutput = {}
        for name, outputs in self.sets.items():
            found[name] = {}
            for output, (cache_set, digest) in outputs.items():
                targets = store.teacher(name).targets(output, cache_set, None if digest else self.method)
                if targets.transform_digest != digest:
                    raise DamagedObject(
                        f"the targets of {name} {output} in {cache_set} were made with transform {digest}, and now "
                        f"with {targets.transform_digest}; make the dataset anew"
                    )
                found[name][output] = targets
        return found
