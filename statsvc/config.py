"""A YAML file as a frozen model: strict, and one sentence per mistake: key, value, rule, way out."""

from __future__ import annotations

import difflib
import re
import reprlib
from pathlib import Path
from typing import Any, TypeVar, get_args

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, ValidationError

from statsvc.errors import PlanError

# What pydantic calls the rules that a plan can break, in the words of a plan.
RULES = {
    "int_type": "a whole number",
    "float_type": "a number",
    "finite_number": "a finite number",
    "string_type": "text (in quotes where YAML reads something else)",
    "bool_type": "true or false",
    "tuple_type": "a list",
    "dict_type": "a mapping",
    "model_type": "a mapping",
    "too_short": "at least one entry",
    "string_too_short": "a name",
}
# The last part of the place of a mistake, where a value may be of several types; what cannot be such a mistake.
UNION_MEMBERS = ("int", "float", "str", "bool", "constrained-int", "literal['all']", "literal['auto']", "[key]")
MAPPING = "dict[str,constrained-int]"
OF_SECTIONS = ("extra_forbidden", "missing", "model_type")


def one_of(table: Any) -> BeforeValidator:
    """A value that must be a key of a table, so that a new entry there is a new choice here."""

    def check(value: Any) -> Any:
        if not isinstance(value, str):
            raise ValueError(f"{show(value)} is not one of {', '.join(table)}")
        if value not in table:
            raise ValueError(f"{show(value)} is not one of {', '.join(table)}{nearest(value, table)}")
        return value

    return BeforeValidator(check)


def nearest(word: str, valid: Any) -> str:
    """A question that names the valid word nearest to a misspelt one, or nothing."""
    match = difflib.get_close_matches(word, list(valid), n=1)
    return f" (did you mean {match[0]!r}?)" if match else ""


class Section(BaseModel):
    """Strict: an unknown key or a value of another type is refused, never guessed."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


Document = TypeVar("Document", bound=Section)


def read_section(path: Path, model: type[Document], name: str, changes: dict[str, Any]) -> Document:
    """What a YAML file holds as a model, with some keys changed; `name` is what users call such a file.

    Raises PlanError with one sentence per mistake: key, value, rule, way out.
    """
    document = read_document(path, name)
    if not isinstance(document, dict):
        raise PlanError(f"{path}: a {name} is a mapping with the keys {', '.join(model.model_fields)}")
    try:
        return model.model_validate(document | changes)
    except ValidationError as error:
        raise PlanError("\n".join(f"{path}: {sentence}" for sentence in _sentences(error, model, name))) from error


def _sentences(error: ValidationError, model: type[Section], name: str) -> list[str]:
    """One sentence for each wrong key: the value, the rule, the way out."""
    rules: dict[str, list[str]] = {}
    misspelt: set[str] = set()
    for mistake in error.errors():
        keys, value = [str(part) for part in mistake["loc"] if part != MAPPING] or [name], mistake["input"]
        if keys[-1] in UNION_MEMBERS and mistake["type"] not in OF_SECTIONS:
            keys.pop()
        key = ".".join(keys)
        match mistake["type"]:
            case "extra_forbidden":
                valid = _valid_keys(model, keys[:-1])
                misspelt.update(difflib.get_close_matches(keys[-1], valid, n=1))
                rules[f"unknown key {key}"] = [
                    f"{show(value)}; the keys here are {', '.join(valid)}{nearest(keys[-1], valid)}"
                ]
            case "missing":
                rules[f"missing key {key}"] = ["add it"]
            case "value_error":
                rules[key] = [f"{mistake['ctx']['error']}"]
            case _:
                rule = RULES.get(mistake["type"], mistake["msg"].removeprefix("Input should be "))
                rules[key] = [*rules[key], rule] if key in rules else [f"{show(value)} is wrong; it must be {rule}"]
    return [
        f"{key}: {' or '.join(parts)}"
        for key, parts in rules.items()
        if not (key.startswith("missing key") and re.split(r"[. ]", key)[-1] in misspelt)
    ]


def _valid_keys(model: type[Section], place: list[str]) -> list[str]:
    """The keys of the section at that place of a document."""
    found: Any = model
    for key in place:
        # Below a mapping, keys are the user's own, and all values are of one kind.
        found = found.model_fields[key].annotation if hasattr(found, "model_fields") else get_args(found)[1]
    return list(found.model_fields)


_SHORT = reprlib.Repr()
_SHORT.maxlevel, _SHORT.maxstring, _SHORT.maxother = 2, 100, 100


def read_document(path: Path, name: str = "plan") -> Any:
    """What the only document of a YAML file holds; every key is text and stands once. Raises PlanError."""
    try:
        loader = _TextKeys(path.read_text("utf-8"))
        try:
            return loader.get_single_data()
        finally:
            loader.dispose()
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
