"""Where teachers come from. A new source is one new file with `resolve` and `load`, and one line in SOURCES."""

from statsvc.errors import PlanError
from statsvc.plan import Teacher, nearest
from workers.teachers import random_vit, transformers
from workers.teachers.base import Resolved, Source

SOURCES: dict[str, Source] = {
    "transformers": transformers,
    "random-vit": random_vit,
}


def resolve(name: str, plan: Teacher) -> Resolved:
    """Find and hash a teacher's files without loading it. Raises PlanError."""
    return source(name, plan).resolve(name, plan)


def source(name: str, plan: Teacher) -> Source:
    """The source of a teacher. Raises PlanError naming those there are."""
    if plan.source not in SOURCES:
        raise PlanError(
            f"teachers.{name}.source: {plan.source!r} is not one of {', '.join(SOURCES)}{nearest(plan.source, SOURCES)}"
        )
    return SOURCES[plan.source]
