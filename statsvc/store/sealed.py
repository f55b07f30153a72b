"""JSON documents that carry a checksum of themselves."""

from __future__ import annotations

import json
from typing import Any

from statsvc.digests import canonical_json, crc32c, crc32c_hex
from statsvc.errors import DamagedObject


def seal(content: dict[str, Any]) -> bytes:
    """Canonical JSON with a crc32c of itself."""
    return canonical_json(with_checksum(content))


def with_checksum(content: dict[str, Any]) -> dict[str, Any]:
    """The content with a crc32c of it as canonical JSON."""
    return {**content, "crc32c": crc32c_hex(crc32c(canonical_json(content)))}


def unseal(path: str, data: bytes) -> dict[str, Any]:
    """What was sealed. Raises DamagedObject for any other bytes, also those that mean the same."""
    try:
        content: dict[str, Any] = json.loads(data)
        del content["crc32c"]
        if seal(content) != data:
            raise ValueError("checksum mismatch")
    except Exception as error:  # whatever the bytes are, they are not ours
        raise not_as_written(path, error) from error
    return content


def checksum_fault(content: dict[str, Any]) -> str | None:
    """What is wrong with a document that holds its checksum; one of an older version has none."""
    if "crc32c" not in content:
        return None
    try:
        sound = with_checksum({key: content[key] for key in content if key != "crc32c"}) == content
    except (ValueError, RecursionError):  # JSON that canonical JSON does not hold
        sound = False
    return None if sound else "checksum mismatch"


def not_as_written(path: str, why: object) -> DamagedObject:
    """Names the document, what is wrong and what to do."""
    return DamagedObject(
        f"{path}: not as it was written ({why}); `statsvc verify --repair` removes or replaces it, and the next run "
        "restores what it removed"
    )
