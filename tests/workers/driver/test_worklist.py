"""What is missing, for states of a store that are written down here: no disk, no teacher, no image."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from statsvc.dataset.expand import DatasetShard
from statsvc.errors import CannotFit, PlanError, StoreError
from statsvc.numerics.normalizations import METHODS
from statsvc.plan import Plan
from statsvc.store.index import Entry
from statsvc.store.layout import FORMAT, digest_of_fit
from statsvc.store.records import OutputRecord, PilotRecord, ReportRecord, RootRecord, TeacherRecord
from workers.driver.checks import check_numbers
from workers.driver.fitting import fit_options
from workers.driver.store_state import Lost, StoreState, TeacherState
from workers.driver.worklist import PilotGroup, Worklist

SHARDS = ("a.tar", "b.tar", "c.tar")
OUTPUTS = {"patches": OutputRecord(tokens=16, dim=32, grid=(4, 4)), "summary": OutputRecord(tokens=1, dim=32)}
SETTINGS = {"batch_size": 4, "precision": "float32"}
SET = f"phi-s-{digest_of_fit(['patches phi-s', 'summary phi-s'])[:12]}-int8"


def plan_of(**changes: Any) -> Plan:
    teacher = {"source": "random-vit", "model": "dinov2"}
    return Plan.model_validate(
        {"store": "store", "data": {"shards": "*.tar"}, "teachers": {"dino": teacher, "siglip": teacher}, **changes}
    )


def report(output: str, method: str, **changes: Any) -> ReportRecord:
    about = {"teacher": "", "output": output, "method": method, "digest": f"{output} {method}", "fingerprint": ""}
    made = {"pilot": [0, 2], "rank": 32, "options": fit_options(plan_of())}
    return ReportRecord.model_validate({**about, **made, **changes})


TEACHER = TeacherState(
    record=TeacherRecord(fingerprint="", outputs=OUTPUTS, preprocessing={}),
    fits={output: {method: f"{output} {method}" for method in METHODS} for output in OUTPUTS},
    reports={output: {method: report(output, method) for method in METHODS} for output in OUTPUTS},
    measured=frozenset({0, 2}),
    cached={SET: frozenset({0, 1, 2})},
)
PILOT = PilotRecord(teachers=["dino", "siglip"], shards=[0, 2], options=fit_options(plan_of()))
STATE = StoreState(
    root=RootRecord(format=FORMAT, rows_per_shard=8),
    teachers={"dino": TEACHER, "siglip": TEACHER},
    index={n: Entry(name, 6, 1, 0, None) for n, name in enumerate(SHARDS)},
    used=frozenset({0, 1, 2}),
    pilots=(PILOT,),
)


def worklist(
    state: StoreState = STATE, plan: Plan | None = None, names: tuple[str, ...] = SHARDS, **known: Any
) -> Worklist:
    shards = {name: DatasetShard(name, name) for name in sorted(names)}
    asked = plan or plan_of()
    return Worklist(asked, shards, state, dict.fromkeys(asked.teachers, SETTINGS), **known)


def with_dino(**changes: Any) -> StoreState:
    return replace(STATE, teachers={**STATE.teachers, "dino": replace(TEACHER, **changes)})


def missing(found: Worklist) -> list[tuple[str, tuple[str, ...]]]:
    return [(unit.name, tuple(job.name for job in unit.teachers)) for unit in found.cache_units()]


def test_nothing_is_missing_of_a_finished_store() -> None:
    found = worklist()
    assert not found.is_anything_missing()
    assert (missing(found), found.new_shards(), found.unfitted(), found.pilot_groups()) == ([], [], [], [])
    assert found.numbers == {"a.tar": 0, "b.tar": 1, "c.tar": 2}


def test_everything_is_missing_of_a_store_that_is_not_there() -> None:
    found = worklist(StoreState())
    assert found.is_anything_missing()
    assert found.unread_shards() == list(SHARDS)
    assert found.pilot_groups() == [PilotGroup(["dino", "siglip"], None)]
    assert list(found.arrays()) == []


@given(
    dino=st.frozensets(st.integers(0, 2)),
    siglip=st.frozensets(st.integers(0, 2)),
    given_up=st.sets(st.sampled_from(SHARDS)),
)
def test_each_uncached_shard_is_one_unit_for_the_teachers_that_lack_it(
    dino: frozenset[int], siglip: frozenset[int], given_up: set[str]
) -> None:
    cached = {"dino": replace(TEACHER, cached={SET: dino}), "siglip": replace(TEACHER, cached={SET: siglip})}
    found = worklist(replace(STATE, teachers=cached), quarantine={"measure": given_up})
    expected = [
        (name, tuple(t for t, done in (("dino", dino), ("siglip", siglip)) if n not in done))
        for n, name in enumerate(SHARDS)
        if name not in given_up
    ]
    assert missing(found) == [(name, teachers) for name, teachers in expected if teachers]
    assert found.is_anything_missing() == bool(missing(found))


def test_another_cache_set_is_no_substitute() -> None:
    found = worklist(with_dino(cached={"raw-float16": frozenset({0, 1, 2})}))
    assert missing(found) == [(name, ("dino",)) for name in SHARDS]


@pytest.mark.parametrize(
    ("state", "unfitted"),
    [
        (with_dino(fits={}, reports={}), ["dino"]),
        (with_dino(fits={o: {m: f"{o} {m}" for m in METHODS if m != "hca"} for o in OUTPUTS}), ["dino"]),
        (with_dino(lost=(Lost("a report", False),)), ["dino"]),
        (replace(STATE, pilots=(PILOT.model_copy(update={"shards": [1]}),)), ["dino", "siglip"]),
        (replace(STATE, pilots=(PILOT.model_copy(update={"options": None}),)), ["dino", "siglip"]),
        (replace(STATE, pilots=(PILOT.model_copy(update={"near": {"dino": {"patches": "x"}}}),)), ["dino"]),
        (replace(STATE, pilots=()), []),
    ],
    ids=["no fit", "an older fit", "a lost report", "another pilot", "other options", "near another", "no pilot"],
)
def test_a_teacher_is_fitted_by_every_method_as_its_pilot_says(state: StoreState, unfitted: list[str]) -> None:
    assert worklist(state).unfitted() == unfitted


def test_only_fits_that_are_due_are_kept() -> None:
    older = with_dino(fits={o: {m: f"{o} {m}" for m in METHODS if m != "hca"} for o in OUTPUTS})
    assert worklist(older).fits_to_keep("dino") == older.teachers["dino"].fits
    assert worklist(replace(older, pilots=(PILOT.model_copy(update={"shards": [1]}),))).fits_to_keep("dino") == {}


def test_teachers_share_the_pilot_they_were_measured_with_and_the_others_a_new_one() -> None:
    state = replace(with_dino(fits={}, reports={}), pilots=(PILOT.model_copy(update={"teachers": ["dino"]}),))
    state = replace(state, teachers={"dino": state.teachers["dino"]})
    first, second = worklist(state).pilot_groups()
    assert (first.teachers, first.pilot) == (["dino"], state.pilots[0])
    assert second == PilotGroup(["siglip"], None)


def test_lost_moments_of_a_pilot_are_measured_again_and_the_fit_stays() -> None:
    found = worklist(with_dino(measured=frozenset({0})))
    assert found.is_fitted("dino")
    assert found.pilot_groups() == [PilotGroup(["dino"], PILOT)]
    (unit,) = found.measure_units(["dino"], found.shards_of_pilot(found.pilot_groups()[0]))
    assert (unit.name, [job.name for job in unit.teachers]) == ("c.tar", ["dino"])


def test_a_shard_of_the_pilot_that_the_plan_has_not_is_asked_for() -> None:
    found = worklist(with_dino(measured=frozenset({0})), names=("a.tar", "b.tar"))
    with pytest.raises(PlanError, match=r"c\.tar is needed again .* name it in the plan"):
        list(found.measure_units(["dino"], found.shards_of_pilot(PilotGroup(["dino"], PILOT))))


def test_raw_features_are_cached_while_they_are_measured() -> None:
    plan = plan_of(targets={"space": "teacher", "dtype": "float16"})
    state = with_dino(measured=frozenset(), cached={"raw-float16": frozenset({1})})
    units = worklist(state, plan).measure_units(["dino"], SHARDS)
    assert [unit.teachers[0].cache_set for unit in units] == ["raw-float16", "", "raw-float16"]


def test_a_refused_method_is_said_where_it_is_needed() -> None:
    refused = {o: {**TEACHER.fits[o], "zca": {"refused": "too few images"}} for o in OUTPUTS}
    found = worklist(with_dino(fits=refused), plan_of(normalize="zca"))
    assert found.uncached("dino") == list(SHARDS)
    with pytest.raises(CannotFit, match="zca was refused for patches: too few images"):
        found.cache_jobs()


def test_samples_are_known_from_the_index_then_the_plan_then_what_is_told() -> None:
    names = (*SHARDS, "d.tar", "e.tar")
    found = worklist(names=names, told={"d.tar": 5})
    assert [found.samples(name) for name in names] == [6, 6, 6, 5, None]
    full = worklist(names=names, plan=plan_of(data={"shards": "*.tar", "rows_per_shard": 9}))
    assert [full.samples(name) for name in names] == [6, 6, 6, 9, 9]


# --- numbers ---

Names = st.sets(st.text("abcxyz", min_size=1, max_size=3), min_size=1, max_size=8)


@given(names=Names, data=st.data())
def test_numbers_stay_while_shards_are_indexed_in_any_order(names: set[str], data: st.DataObject) -> None:
    known = data.draw(st.sets(st.sampled_from(sorted(names))))
    places = data.draw(st.permutations(range(len(names) + 2)))
    index = {place: Entry(name, 6, 1, 0, None) for place, name in zip(places, sorted(known), strict=False)}
    plan = plan_of(data={"shards": "*.tar", "rows_per_shard": 8})

    def numbers(entries: dict[int, Entry]) -> dict[str, int]:
        return worklist(StoreState(index=entries), plan, tuple(names)).numbers

    first = numbers(index)
    assert sorted(first) == sorted(names)
    assert len(set(first.values())) == len(names)
    assert {first[entry.name]: entry for entry in index.values()} == index
    done = data.draw(st.sets(st.sampled_from(sorted(names))))
    assert numbers(index | {first[name]: Entry(name, 6, 1, 0, None) for name in done}) == first


def test_lost_numbers_come_back_and_new_shards_take_free_ones() -> None:
    index = {n: entry for n, entry in STATE.index.items() if n != 1}
    state = replace(STATE, index=index, lost_numbers={"b.tar": 1})
    found = worklist(state, names=(*SHARDS, "0.tar"), told={"b.tar": 6, "0.tar": 2})
    assert found.numbers == {"a.tar": 0, "b.tar": 1, "c.tar": 2, "0.tar": 3}
    check_numbers(found)


def test_a_number_of_a_pilot_is_given_to_nobody_new() -> None:
    """Else the moments of another dataset shard would count as those that a fit was made on."""
    lost = replace(STATE, index={n: entry for n, entry in STATE.index.items() if n != 2}, used=frozenset({0, 1}))
    dino = replace(TEACHER, measured=frozenset({0}), cached={SET: frozenset({0, 1})})
    found = worklist(replace(lost, teachers={"dino": dino, "siglip": dino}), told={"c.tar": 6})
    assert found.numbers == {"a.tar": 0, "b.tar": 1, "c.tar": 3}
    assert (found.unfitted(), found.pilot_groups()) == ([], [])
    check_numbers(found)


def test_work_without_an_index_stops_new_dataset_shards() -> None:
    state = replace(STATE, index={n: entry for n, entry in STATE.index.items() if n != 1})
    with pytest.raises(
        StoreError, match=r"work under the number 1 without an index, and dataset shard b\.tar .* --repair"
    ):
        check_numbers(worklist(state))
