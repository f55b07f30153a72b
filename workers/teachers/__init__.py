"""Where teachers come from. A new source is one new file with `resolve` and `load`, and one line in SOURCES."""

from statsvc.config import nearest
from statsvc.errors import PlanError
from statsvc.plan import Teacher
from workers.teachers import export, open_clip, python, random_vit, timm, transformers
from workers.teachers.base import Resolved, Source

SOURCES: dict[str, Source] = {
    "transformers": transformers,
    "timm": timm,
    "open_clip": open_clip,
    "python": python,
    "export": export,
    "random-vit": random_vit,
}


def resolve(name: str, plan: Teacher) -> Resolved:
    """Find and hash a teacher's files without loading it. Raises PlanError."""
    resolved = source(name, plan).resolve(name, plan)
    pad, size = resolved.preprocessing.pad, resolved.preprocessing.size
    if pad is not None and pad < size:
        raise PlanError(
            f"teachers.{name}.pad: {pad} is smaller than the size {size}; the canvas must hold the view, which is "
            "placed on it unscaled"
        )
    return resolved


def source(name: str, plan: Teacher) -> Source:
    """The source of a teacher. Raises PlanError naming those there are."""
    if plan.source not in SOURCES:
        raise PlanError(
            f"teachers.{name}.source: {plan.source!r} is not one of {', '.join(SOURCES)}{nearest(plan.source, SOURCES)}"
        )
    return SOURCES[plan.source]
