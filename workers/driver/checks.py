"""Every reason to refuse a plan for the store that it names."""

from __future__ import annotations

from statsvc.errors import PlanError
from statsvc.plan import Plan
from statsvc.store.layout import Output
from workers.driver.phases.fit import DEFAULT_OPTIONS, fit_options
from workers.driver.worklist import Agenda


def check_rank(plan: Plan, outputs: dict[str, dict[str, Output]]) -> None:
    """Raises PlanError where a teacher has fewer channels than the plan wants of its targets."""
    for name, shapes in outputs.items():
        for output, shape in shapes.items():
            if plan.targets.rank is not None and plan.targets.rank > shape.dim:
                raise PlanError(
                    f"targets.rank: {plan.targets.rank} is more than the {shape.dim} channels of {output} of "
                    f"teachers.{name}; choose a smaller one"
                )


def check_fits(agenda: Agenda) -> None:
    """Raises PlanError where the plan would fit in another way than the store's fits were made: none is redone."""
    for name in agenda.plan.teachers:
        known = agenda.known_pilot([name])
        if known is None:
            continue
        asked, made = fit_options(agenda.plan), known.get("options") or DEFAULT_OPTIONS
        # Features in the teacher's space keep all channels, whatever the rank of the targets beside them.
        if differing := [k for k in asked if asked[k] != made[k] and not (k == "rank" and agenda.is_raw)]:
            values = ", ".join(f"{key} is {made[key]} there and {asked[key]} here" for key in differing)
            raise PlanError(
                f"teachers.{name}: the store {agenda.plan.store!r} holds fits made with other options: {values}. Use "
                f"those, or `statsvc refit PLAN{' --fresh' if 'rank' in differing else ''}`, which fits anew and "
                "leaves what is cached alone"
            )
