"""A YAML file as plain Python values, or one sentence on why not: nothing is guessed, and nothing in it is executed."""

from __future__ import annotations

import re
import reprlib
from pathlib import Path
from typing import Any

import yaml

from statsvc.errors import PlanError

_SHORT = reprlib.Repr()
_SHORT.maxlevel, _SHORT.maxstring, _SHORT.maxother = 2, 100, 100


def read_document(path: Path, name: str = "plan") -> Any:
    """What the only document of a YAML file holds; every key is text and stands once. Raises PlanError."""
    try:
        return yaml.load(path.read_text("utf-8"), _TextKeys)
    except OSError as error:
        raise PlanError(f"cannot read the {name} {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise PlanError(f"{path} is not UTF-8: {error.reason} at byte {error.start}; save it as UTF-8 text") from error
    except _WrongKey as error:
        raise PlanError(f"{path}, {error}") from error
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f", line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        problem = " ".join(part for part in (getattr(error, "context", ""), getattr(error, "problem", "")) if part)
        raise PlanError(
            f"{path}{where}: {problem or ' '.join(str(error).split())}; YAML indents with spaces, not tabs, and wants "
            "quotes around text with : # { [ * & ! in it"
        ) from error
    except ValueError as error:  # a number or date of a form that exists, but not of any value
        raise PlanError(f"{path}: a value is impossible: {error}; put it in quotes if it is text") from error
    except RecursionError as error:
        raise PlanError(f"{path}: too many brackets inside brackets; a {name} needs no more than four") from error


def show(value: Any) -> str:
    """A value as a sentence can hold it: YAML aliases can make a small file stand for billions of entries."""
    try:
        return _SHORT.repr(list(value) if isinstance(value, tuple) else value)
    except ValueError:  # Python refuses to print such numbers
        return "a number of thousands of digits"


class _WrongKey(Exception):
    """Where and why."""


class _TextKeys(yaml.SafeLoader):
    """A safe loader that refuses a key given twice, where YAML would silently keep the last one, and `no: 1`."""


def _mapping(loader: _TextKeys, node: yaml.MappingNode) -> dict[str, Any]:
    mapping: dict[str, Any] = {}
    for key_node, value_node in node.value:
        where = f"line {key_node.start_mark.line + 1}, column {key_node.start_mark.column + 1}"
        if key_node.tag != "tag:yaml.org,2002:str":
            key = repr(key_node.value) if isinstance(key_node, yaml.ScalarNode) else "a list or mapping"
            raise _WrongKey(f"{where}: {key} cannot be a key; put text in quotes, and write out what << would merge")
        key = loader.construct_object(key_node, deep=True)
        if key in mapping:
            raise _WrongKey(f"{where}: the key {key!r} stands here twice; remove or rename one of them")
        mapping[key] = loader.construct_object(value_node, deep=True)
    return mapping


# YAML 1.1 wants a dot in 1.0e-3; people, and YAML 1.2, take 1e-3 for a number.
_SMALL = re.compile(r"[-+]?[0-9]+[eE]-[0-9]+\Z")
_TextKeys.add_implicit_resolver("tag:yaml.org,2002:float", _SMALL, list("-+0123456789"))
_TextKeys.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _mapping)
