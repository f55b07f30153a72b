"""Plans: what is accepted, and one sentence with key, value and way out for everything that is not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from statsvc.config import nearest
from statsvc.errors import PlanError
from statsvc.plan import Plan, read_plan
from tests.support.refusals import file_refusal, file_refuses, refuses

# DESIGN.md section 4, without what later versions bring: other engines, other dtypes, other views.
EXAMPLE = """\
store: ./store                       # local path
data:
  shards: photos/train-{000000..000099}.tar   # braces, globs, lists
  images: [jpg, jpeg, png, webp]
  rows_per_shard: null               # null: scanned in the index phase
views: {kind: center, per_image: 1, seed: 0}
teachers:                            # names: [a-z0-9][a-z0-9_-]{0,63}
  dino:   {source: transformers, model: facebook/dinov2-base, size: 224}
  siglip: {source: timm, model: vit_so400m_patch14_siglip_384, size: 384}
statistics: {stop: converged, max_images: 100000}
normalize: phi-s
targets: {space: normalized, dtype: int8}
engine: {kind: inline, batch_size: auto, decoders: auto}
"""
LEAST = """\
store: ./store
data: {shards: a.tar}
teachers: {dino: {source: transformers, model: facebook/dinov2-base}}
"""


def read(text: str | bytes, folder: Path) -> Plan:
    path = folder / "plan.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return read_plan(path)


def refusal(text: str | bytes, folder: Path) -> str:
    return file_refusal(text, folder / "plan.yaml", read_plan)


# What is accepted


def test_example_of_the_design_is_accepted(tmp_path: Path) -> None:
    plan = read(EXAMPLE, tmp_path)
    assert plan.store == "./store"
    assert plan.data.shards == ("photos/train-{000000..000099}.tar",)
    assert plan.data.images == ("jpg", "jpeg", "png", "webp")
    assert {name: (t.source, t.model, t.size) for name, t in plan.teachers.items()} == {
        "dino": ("transformers", "facebook/dinov2-base", 224),
        "siglip": ("timm", "vit_so400m_patch14_siglip_384", 384),
    }
    assert plan.statistics.max_images == 100_000


def test_rank_is_for_phi_s_alone(tmp_path: Path) -> None:
    assert read(LEAST + "targets: {rank: 64}\n", tmp_path).targets.rank == 64
    sentence = refusal(LEAST + "targets: {rank: 64}\nnormalize: zca\n", tmp_path)
    assert sentence == "plan: targets.rank is for normalize: phi-s, not zca; remove it"


def test_caller_may_give_another_store_than_the_plan(tmp_path: Path) -> None:
    (tmp_path / "plan.yaml").write_text(LEAST)
    (tmp_path / "none.yaml").write_text(LEAST.partition("\n")[2])
    assert read_plan(tmp_path / "plan.yaml", "/store") == read(LEAST.replace("./store", "/store"), tmp_path)
    assert read_plan(tmp_path / "none.yaml", "/store").store == "/store"
    refuses("...store: '' is wrong...", read_plan, tmp_path / "none.yaml", "")


def test_missing_sections_have_the_defaults_of_the_example(tmp_path: Path) -> None:
    example, least = read(EXAMPLE, tmp_path), read(LEAST, tmp_path)
    for section in ("views", "statistics", "normalize", "targets", "engine"):
        assert getattr(least, section) == getattr(example, section)
    assert least.data.images == example.data.images
    assert least.data.rows_per_shard is None
    teacher = least.teachers["dino"]
    assert teacher.model_dump(exclude={"source", "model"}) == {
        "revision": None, "size": None, "pad": None, "interpolation": None, "mean": None, "std": None,
        "precision": "auto", "taps": {}, "trust_remote_code": False, "options": {},
    }  # fmt: skip


FORMS = {
    "data.shards=[a.tar, b/*.tar]": ("a.tar", "b/*.tar"),
    "data.shards=a.tar": ("a.tar",),
    "data.images=[.JPG, Png]": ("jpg", "png"),
    "data.images=jpg": ("jpg",),
    "data.rows_per_shard=1_000": 1000,
    "statistics.images=768000": 768_000,
    "statistics.images=all": "all",
    "targets.dtype=float16": "float16",
    "normalize=standardize": "standardize",
    "engine.batch_size=32": 32,
    "teachers.dino.mean=[0, 0.5, 1]": (0.0, 0.5, 1.0),
    "teachers.dino.std=[1, 0.5, 2]": (1.0, 0.5, 2.0),
    "teachers.dino.mean=null": None,
    "teachers.dino.taps={patches: last_hidden_state, summary: null}": {"patches": "last_hidden_state", "summary": None},
    "teachers.dino.options={seed: 3, scale: 0.5, name: x, deep: true}":
        {"seed": 3, "scale": 0.5, "name": "x", "deep": True},
    "teachers.dino.interpolation=lanczos": "lanczos",
    'teachers.dino.revision="1234567"': "1234567",
}  # fmt: skip


@pytest.mark.parametrize(("line", "value"), FORMS.items())
def test_every_documented_form_of_a_value_is_understood(line: str, value: Any, tmp_path: Path) -> None:
    found: Any = read(with_value(line), tmp_path)
    for key in line.partition("=")[0].split("."):
        found = found[key] if isinstance(found, dict) else getattr(found, key)
    assert found == value
    if isinstance(value, dict):  # 1 == True, in Python
        assert {key: type(item) for key, item in found.items()} == {key: type(item) for key, item in value.items()}


@pytest.mark.parametrize(
    ("views", "settings"),
    [
        ("{}", {"kind": "center", "per_image": 1, "seed": 0}),
        ("{kind: whole, seed: 3}", {"kind": "whole", "per_image": 1, "seed": 3}),
        (
            "{kind: random-resized-crop, per_image: 4, scale: null}",
            {
                "kind": "random-resized-crop", "per_image": 4, "seed": 0,
                "scale": [0.08, 1.0], "ratio": [0.75, 1.3333333333333333], "flip": 0.5,
            },
        ),
        (
            "{kind: random-resized-crop, seed: 1, scale: [0.5, 1], ratio: [1, 1], flip: 0}",
            {
                "kind": "random-resized-crop", "per_image": 1, "seed": 1,
                "scale": [0.5, 1.0], "ratio": [1.0, 1.0], "flip": 0.0,
            },
        ),
    ],
)  # fmt: skip
def test_settings_of_views_hold_what_decides_them(views: str, settings: dict[str, Any], tmp_path: Path) -> None:
    plan = read(f"{LEAST}views: {views}\n", tmp_path)
    assert plan.views.settings() == settings
    assert Plan.model_validate(plan.model_dump(mode="json")) == plan


@pytest.mark.parametrize("change", [lambda text: "\ufeff" + text, lambda text: text.replace("\n", "\r\n")])
def test_byte_order_marks_and_windows_lines_are_accepted(change: Any, tmp_path: Path) -> None:
    assert read(change(EXAMPLE), tmp_path) == read(EXAMPLE, tmp_path)


def test_aliases_stand_for_what_they_name(tmp_path: Path) -> None:
    plan = read(LEAST.replace("model: facebook/dinov2-base", "model: &m ./m") + "normalize: global\n", tmp_path)
    assert plan.teachers["dino"].model == "./m"
    shared = "store: s\ndata: {shards: &s [a.tar], images: *s}\nteachers: {d: {source: x, model: m}}"
    assert read(shared, tmp_path).data.images == ("a.tar",)


@pytest.mark.parametrize("name", ["a", "0", "dino_v2-b", "x" * 64])
def test_teachers_may_be_named_by_letters_digits_and_dashes(name: str, tmp_path: Path) -> None:
    assert list(read(LEAST.replace("dino:", f'"{name}":'), tmp_path).teachers) == [name]


def test_plan_cannot_be_changed(tmp_path: Path) -> None:
    plan = read(LEAST, tmp_path)
    for section, key in ((plan, "store"), (plan.data, "rows_per_shard"), (plan.teachers["dino"], "size")):
        with pytest.raises(ValidationError, match="frozen"):
            setattr(section, key, 3)


# Wrong keys and values


def with_value(line: str) -> str:
    """The least plan with one more value: "engine.kind=inline"."""
    place, _, text = line.partition("=")
    document = yaml.safe_load(LEAST)
    section = document
    *sections, last = place.split(".")
    for key in sections:
        section = section.setdefault(key, {})
    section[last] = yaml.safe_load(text)
    return yaml.safe_dump(document)


WRONG = {
    "normalise=phi-s": "unknown key normalise: 'phi-s'; the keys here are store, ... (did you mean 'normalize'?)",
    "targets.dtypes=int8":
        "unknown key targets.dtypes: 'int8'; the keys here are space, dtype, rank (did you mean 'dtype'?)",
    "teachers.dino.sise=224": "unknown key teachers.dino.sise: 224; ... (did you mean 'size'?)",
    "data.shardz=[a]": "unknown key data.shardz: ['a']; ... (did you mean 'shards'?)",
    "zzz=1": "unknown key zzz: 1; the keys here are store, data, views, ..., engine",
    "store=5": "store: 5 is wrong; it must be text (in quotes where YAML reads something else)",
    "store=2024-01-01": "store: datetime.date(2024, 1, 1) is wrong; it must be text (in quotes ...)",
    "store=null": "store: None is wrong; it must be text ...",
    'store=""': "store: '' is wrong; it must be a name",
    "data=[a.tar]": "data: ['a.tar'] is wrong; it must be a mapping",
    "data=null": "data: None is wrong; it must be a mapping",
    "data.shards=3": "data.shards: 3 is wrong; it must be a list",
    "data.shards={a: b}": "data.shards: {'a': 'b'} is wrong; it must be a list",
    "data.shards=[]": "data.shards: [] is wrong; it must be at least one entry",
    "data.shards=[a.tar, 3]": "data.shards.1: 3 is wrong; it must be text ...",
    "data.images=[]": "data.images: [] is wrong; it must be at least one entry",
    "data.rows_per_shard=1e3": "data.rows_per_shard: '1e3' is wrong; it must be a whole number",
    "data.rows_per_shard=0": "data.rows_per_shard: 0 is wrong; it must be greater than 0",
    "views.kind=centre": "views.kind: 'centre' is wrong; it must be 'center', 'whole' or 'random-resized-crop'",
    "views.per_image=2":
        "views: per_image: 2 is for kind: random-resized-crop, all center views of an image are the same; ...",
    "views.per_image=0": "views.per_image: 0 is wrong; it must be greater than 0",
    "views.scale=[0.1, 1]": "views: scale is for kind: random-resized-crop, not center; remove it",
    "views.flip=0": "views: flip is for kind: random-resized-crop, not center; remove it",
    "views={kind: whole, ratio: [1, 2]}": "views: ratio is for kind: random-resized-crop, not whole; remove it",
    "views={kind: random-resized-crop, per_image: 257}":
        "views.per_image: 257 is wrong; it must be less than or equal to 256",
    "views={kind: random-resized-crop, scale: 0.5}":
        "views.scale: 0.5 is not a list of two numbers, the least and the largest",
    "views={kind: random-resized-crop, scale: [0.5, 0.2]}":
        "views.scale: [0.5, 0.2] begins with the larger number; write the least first",
    "views={kind: random-resized-crop, scale: [0, 1]}": "views.scale.0: 0 is wrong; it must be greater than 0",
    "views={kind: random-resized-crop, scale: [0.5, 2]}":
        "views.scale.1: 2 is wrong; it must be less than or equal to 1",
    "views={kind: random-resized-crop, ratio: [0.001, 1]}":
        "views.ratio.0: 0.001 is wrong; it must be greater than or equal to 0.01",
    "views={kind: random-resized-crop, flip: true}": "views.flip: True is wrong; it must be a number",
    "views={kind: random-resized-crop, flip: 50}": "views.flip: 50 is wrong; it must be less than or equal to 1",
    "views.seed=1.5": "views.seed: 1.5 is wrong; it must be a whole number",
    "teachers=[dino]": "teachers: ['dino'] is wrong; it must be a mapping",
    "teachers={}": "teachers: {} is wrong; it must be at least one entry",
    "teachers=null": "teachers: None is wrong; it must be a mapping",
    "teachers.dino=dinov2": "teachers.dino: 'dinov2' is wrong; it must be a mapping",
    "teachers.int=3": "teachers.int: 3 is wrong; it must be a mapping",
    "teachers.dino.source=3": "teachers.dino.source: 3 is wrong; it must be text ...",
    "teachers.dino.revision=1234567": "teachers.dino.revision: 1234567 is wrong; it must be text (in quotes ...)",
    "teachers.dino.size=big": "teachers.dino.size: 'big' is wrong; it must be a whole number",
    "teachers.dino.size=224.0": "teachers.dino.size: 224.0 is wrong; it must be a whole number",
    "teachers.dino.size=true": "teachers.dino.size: True is wrong; it must be a whole number",
    "teachers.dino.size=-3": "teachers.dino.size: -3 is wrong; it must be greater than 0",
    "teachers.dino.interpolation=bicubicc": "...: 'bicubicc' is not one of nearest, ... (did you mean 'bicubic'?)",
    "teachers.dino.interpolation=3": "teachers.dino.interpolation: 3 is not one of nearest, ...",
    "teachers.dino.mean=0.5": "teachers.dino.mean: 0.5 is not a list of three numbers, ...",
    "teachers.dino.mean=[1, 1]": "teachers.dino.mean: [1, 1] is not a list of three numbers, ...",
    "teachers.dino.mean=[1, null, 1]": "teachers.dino.mean.1: None is wrong; it must be a number",
    'teachers.dino.mean=[1, "0.5", 1]': "teachers.dino.mean.1: '0.5' is wrong; it must be a number",
    "teachers.dino.mean=[1, .nan, 1]": "teachers.dino.mean.1: nan is wrong; it must be a finite number",
    "teachers.dino.std=[1, 0, 1]": "teachers.dino.std.1: 0 is wrong; it must be greater than 0",
    "teachers.dino.std=[1, .inf, 1]": "teachers.dino.std.1: inf is wrong; it must be a finite number",
    "teachers.dino.precision=fp16":
        "teachers.dino.precision: 'fp16' is wrong; it must be 'auto', 'float32', 'bfloat16' or 'float16'",
    "teachers.dino.taps={patchs: x}": "teachers.dino.taps.patchs: 'patchs' is wrong; it must be 'patches' or 'summary'",
    "teachers.dino.taps={patches: 3}": "teachers.dino.taps.patches: 3 is wrong; it must be text ...",
    'teachers.dino.trust_remote_code="yes"':
        "teachers.dino.trust_remote_code: 'yes' is wrong; it must be true or false",
    "teachers.dino.options=[1]": "teachers.dino.options: [1] is wrong; it must be a mapping",
    "teachers.dino.options={x: [1]}":
        "teachers.dino.options.x: [1] is wrong; it must be a whole number or a number or text ... or true or false",
    "teachers.Dino v2={source: x, model: m}": "teachers: the name 'Dino v2' must be 1 to 64 of a-z, 0-9, _, -, ...",
    "teachers.-x={source: x, model: m}": "teachers: the name '-x' must be ...",
    f"teachers.{'x' * 65}={{source: x, model: m}}": "teachers: the name 'xxx...' must be ...",
    "teachers.a/b={source: x, model: m}": "teachers: the name 'a/b' must be ...",
    "statistics.images=some": "statistics.images: 'some' is wrong; it must be a whole number or 'all'",
    "statistics.images=0": "statistics.images: 0 is wrong; it must be greater than 0 or 'all'",
    "statistics.max_images=1.5": "statistics.max_images: 1.5 is wrong; it must be a whole number",
    "statistics.stop=never": "statistics.stop: 'never' is wrong; it must be 'converged'",
    "normalize=phis": "normalize: 'phis' is not one of phi-s, global, standardize, ... (did you mean 'phi-s'?)",
    "normalize=[phi-s]": "normalize: ['phi-s'] is not one of phi-s, global, standardize, pca, zca, hca",
    "targets.dtype=int3": "targets.dtype: 'int3' is not one of int8, int4, float16, float32 (did you mean 'int8'?)",
    "targets.dtype=8": "targets.dtype: 8 is not one of int8, int4, float16, float32",
    "targets.space=raw": "targets.space: 'raw' is wrong; it must be 'normalized' or 'teacher'",
    "targets.rank=0": "targets.rank: 0 is wrong; it must be greater than 0",
    "targets={space: teacher}": "targets: dtype int8 is for normalized targets; with space: teacher use ...",
    "targets={space: teacher, dtype: float16, rank: 8}": "targets: rank is for normalized targets, ...",
    "whitening.max_gain=0.5": "whitening.max_gain: 0.5 is wrong; it must be greater than or equal to 1",
    "whitening.eigenvalue_floor=1": "whitening.eigenvalue_floor: 1 is wrong; it must be less than 1",
    "statistics.tokens_per_image=-1":
        "statistics.tokens_per_image: -1 is wrong; it must be greater than 0 or a mapping",
    "statistics.tokens_per_image={}": "statistics.tokens_per_image: {} is wrong; ...",
    'statistics.tokens_per_image={"a*": 0}':
        "statistics.tokens_per_image: {'a*': 0} is wrong; it must be a whole number\n"
        "statistics.tokens_per_image.a*: 0 is wrong; it must be greater than 0",
    "teachers.dino.taps={patches: null, summary: null}": "...: every output is dropped; keep patches or summary",
    "engine.kind=slurm": "engine.kind: 'slurm' is not one of inline, ray",
    "engine.kind=rai": "engine.kind: 'rai' is not one of inline, ray (did you mean 'ray'?)",
    "engine.adress=auto": "unknown key engine.adress: 'auto'; ... (did you mean 'address'?)",
    "engine={address: auto}": "engine: address is for kind: ray, not inline; remove it, or set kind: ray",
    "engine={gpus: all}": "engine: gpus is for kind: ray, ...; remove it, or set CUDA_VISIBLE_DEVICES",
    "engine={kind: ray, gpus: none}": "engine.gpus: 'none' is wrong; it must be a whole number or 'all'",
    "engine={kind: ray, cpus_per_worker: 0}": "engine.cpus_per_worker: 0 is wrong; it must be greater than 0",
    "engine={kind: ray, address: head}": "engine.address: 'head' is wrong; it must be local, auto, or host:port ...",
    "engine={kind: ray, address: 'ray://head:10001'}":
        "engine.address: 'ray://head:10001' is for Ray Client, ...; give host:port of the head without ray://, ...",
    "engine.batch_size=big": "engine.batch_size: 'big' is wrong; it must be a whole number or 'auto'",
    "engine.decoders=-1": "engine.decoders: -1 is wrong; it must be greater than 0 or 'auto'",
}  # fmt: skip


@pytest.mark.parametrize(("line", "sentence"), WRONG.items())
def test_wrong_key_or_value_gives_one_sentence_with_the_way_out(line: str, sentence: str, tmp_path: Path) -> None:
    file_refuses(sentence, with_value(line), tmp_path / "plan.yaml", read_plan)


def test_missing_keys_are_named_unless_a_misspelled_one_explains_them(tmp_path: Path) -> None:
    missing = [f"missing key {key}: add it" for key in ("store", "data", "teachers")]
    assert refusal("{}", tmp_path).splitlines() == missing
    no_model = refusal(LEAST.replace(", model: facebook/dinov2-base", ""), tmp_path)
    assert no_model == "missing key teachers.dino.model: add it"
    assert refusal(LEAST.replace("store:", "stor:"), tmp_path).startswith("unknown key stor: './store'")


def test_every_mistake_has_its_sentence(tmp_path: Path) -> None:
    text = LEAST.replace("a.tar", "3").replace("model:", "modell:") + "normalize: x\nengine: {kind: 5}\n"
    keys = [sentence.partition(": ")[0] for sentence in refusal(text, tmp_path).splitlines()]
    assert sorted(keys) == ["data.shards", "engine.kind", "normalize", "unknown key teachers.dino.modell"]


def test_nearest_valid_word_is_suggested_and_a_far_one_is_not() -> None:
    assert nearest("phi_s", ["phi-s", "global"]) == " (did you mean 'phi-s'?)"
    assert nearest("whitening", ["phi-s", "global"]) == ""


# What YAML makes of a file


MISREAD = {
    "": "a plan is a mapping with the keys store, data, ..., engine",
    "# nothing yet\n": "a plan is a mapping with the keys ...",
    "- store: s\n": "a plan is a mapping with the keys ...",
    "./store": "a plan is a mapping with the keys ...",
    "store: s\ndata:\n\tshards: a": "line 3, column 1: ...'\\t'...; YAML indents with spaces, not tabs, ...",
    LEAST + "store: other\n": "line 4, column 1: the key 'store' stands here twice; remove or rename one of them",
    LEAST.replace("a.tar", "a.tar, shards: b.tar"): "line 2, column 23: the key 'shards' stands here twice; ...",
    LEAST.replace("{dino:", "{dino: 1, dino:"): "line 3, column 21: the key 'dino' stands here twice; ...",
    LEAST.replace("dino:", "no:"): "line 3, column 12: 'no' cannot be a key; put text in quotes, ...",
    LEAST.replace("dino:", "2024-01-01:"): "line 3, column 12: '2024-01-01' cannot be a key; put text in quotes, ...",
    LEAST + "3: 4\n": "line 4, column 1: '3' cannot be a key; put text in quotes, ...",
    LEAST + "[a, b]: 4\n": "line 4, column 1: a list or mapping cannot be a key; ...",
    "store: {{ folder }}/store": "line 1, ...",
    "store: {{folder}}": "line 1, column 9: a list or mapping cannot be a key; put text in quotes, ...",
    "a: &a {b: 1}\nc: {<<: *a}": "line 2, column 5: '<<' cannot be a key; ..., and write out what << would merge",
    "store: a: b": "line 1, column 9: mapping values are not allowed here; ... quotes around text with : ...",
    "store: [a": "line 1, column 10: ...; ...",
    "store: *nowhere": "line 1, column 8: found undefined alias 'nowhere'; ...",
    "store: &a [*a]": "line 1, column 8: found unconstructable recursive node; ...",
    LEAST + "---\n" + LEAST: "line 4, column 1: expected a single document in the stream ...",
    "store: !!python/object/apply:os.mkdir [here]":
        "line 1, column 8: could not determine a constructor for the tag ...",
    "store: 2024-99-99": "a value is impossible: month must be in 1..12; put it in quotes if it is text",
    "views: {seed: " + "9" * 5000 + "}": "a value is impossible: ...; put it in quotes if it is text",
    "[" * 5000: "too many brackets inside brackets; a plan needs no more than four",
    "{a: " * 5000: "too many brackets inside brackets; a plan needs no more than four",
    'store: "a\x00b"': "unacceptable character #x0000: ...",
    LEAST.encode("utf-16"): "is not UTF-8: invalid start byte at byte 0; save it as UTF-8 text",
    b"store: \xff": "is not UTF-8: invalid start byte at byte 7; save it as UTF-8 text",
    b"\x1f\x8b\x08\x00binary": "is not UTF-8: ...; save it as UTF-8 text",
}  # fmt: skip


@pytest.mark.parametrize(("text", "sentence"), MISREAD.items())
def test_misreadable_yaml_gives_one_sentence_with_place_and_way_out(
    text: str | bytes, sentence: str, tmp_path: Path
) -> None:
    file_refuses(sentence, text, tmp_path / "plan.yaml", read_plan)


def test_nothing_in_a_plan_is_executed(tmp_path: Path) -> None:
    evidence = tmp_path / "evidence"
    refusal(f"store: !!python/object/apply:os.mkdir [{evidence}]", tmp_path)
    assert not evidence.exists()


def test_file_that_unfolds_to_billions_of_values_is_refused_shortly(tmp_path: Path) -> None:
    bomb = "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n"
    bomb += "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]\n" for i in range(1, 12))
    said = refusal(bomb, tmp_path)
    assert "unknown key a11" in said
    assert len(said) < 20_000
    for place in ("store", "data", "normalize", "targets", "engine"):
        inside = bomb.replace("a0:", "views:", 1) + LEAST.replace("store: ./store\n", "").replace("data:", "store:")
        assert len(refusal(f"{inside}{place}: *a11\n", tmp_path)) < 20_000
    assert len(refusal(LEAST + f"normalize: {'x' * 100_000}\n", tmp_path)) < 400
    assert len(refusal(LEAST.replace("dino:", f"{'y' * 100_000}:"), tmp_path)) < 400


def test_unreadable_file_is_named(tmp_path: Path) -> None:
    refuses("...cannot read the plan ...missing.yaml: No such file...", read_plan, tmp_path / "missing.yaml")
    refuses("...cannot read the plan ...: Is a directory...", read_plan, tmp_path)


TRAPS = [
    "", *"{}[]:?'\"%@`|>~\t\n\x85\u2028", "- ", "&a ", "*a", "<<: ", "!!set ", "null", "no", "1", "1e3", ".nan", "0o17",
    "2024-01-01", "2024-99-99", "1:30", "!!binary x", "? [a]\n: b",
]  # fmt: skip


@settings(deadline=None, max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_changed_plan_is_read_or_refused_in_sentences(data: st.DataObject, tmp_path: Path) -> None:
    """Cut somewhere, with something in its place that YAML or people take for something else."""
    start = data.draw(st.integers(0, len(EXAMPLE)))
    end = data.draw(st.integers(start, min(start + 12, len(EXAMPLE))))
    text = EXAMPLE[:start] + data.draw(st.sampled_from(TRAPS)) + EXAMPLE[end:]
    try:
        said = str(read(text, tmp_path))
    except PlanError as error:
        said = str(error)
    assert said
