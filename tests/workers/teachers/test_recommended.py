"""Those teachers that the README recommends with taps, small and with random weights; test_transformers has the others.

Suffixes: B = images, S = side in pixels, T = tokens, D = channels.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import transformers
from safetensors.torch import save_file

from tests.support.checkpoints import GIVEN, SAM, save_checkpoint
from tests.support.refusals import refuses
from tests.support.teachers import Keys, assert_same, images, load, pixels

# Code as it comes with C-RADIO: another name for the pixels, several CLS-like vectors in a row, a named tuple.
RADIO = """
from typing import NamedTuple

import torch
from transformers import PretrainedConfig, PreTrainedModel


class Found(NamedTuple):
    summary: torch.Tensor
    features: torch.Tensor


class Configuration(PretrainedConfig):
    def __init__(self, patch_size=8, width=24, named=True, **other):
        self.patch_size, self.width, self.named = patch_size, width, named
        super().__init__(**other)


class Model(PreTrainedModel):
    config_class = Configuration

    def __init__(self, config):
        super().__init__(config)
        self.stem = torch.nn.Conv2d(3, config.width, config.patch_size, config.patch_size)
        self.post_init()

    def forward(self, x):
        map_ = self.stem(x).tanh()
        summary, features = torch.cat([map_.mean((2, 3)), map_.amax((2, 3))], 1), map_.flatten(2).mT
        return Found(summary, features) if self.config.named else (summary, features)
"""


class Radio(NamedTuple):
    folder: Path
    stem: torch.nn.Conv2d

    @property
    def keys(self) -> Keys:
        return {"source": "transformers", "model": str(self.folder), "trust_remote_code": True}

    def oracle(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Summary and features of images(32), whose pixels the model normalizes by itself."""
        with torch.inference_mode():
            map_BDRC = self.stem(pixels(images(32), (0, 0, 0), (1, 1, 1))).tanh()
        return torch.cat([map_BDRC.mean((2, 3)), map_BDRC.amax((2, 3))], 1), map_BDRC.flatten(2).mT


@pytest.fixture
def radio(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Radio:
    """A folder with code, laid out as C-RADIO's."""
    # transformers copies the code here before it imports it.
    monkeypatch.setattr(transformers.dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.syspath_prepend(str(tmp_path / "modules"))
    folder = tmp_path / "radio"
    folder.mkdir()
    write_config(folder)
    (folder / "radio_code.py").write_text(RADIO)
    processor = {"do_normalize": False, "do_rescale": True, "resample": 3, "size": {"shortest_edge": 32}}
    (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    torch.manual_seed(0)
    stem = torch.nn.Conv2d(3, 24, 8, 8)
    save_file({f"stem.{k}": v for k, v in stem.state_dict().items()}, folder / "model.safetensors", {"format": "pt"})
    return Radio(folder, stem)


def write_config(folder: Path, **changes: Any) -> None:
    config = {
        "model_type": "",
        "auto_map": {"AutoConfig": "radio_code.Configuration", "AutoModel": "radio_code.Model"},
        **changes,
    }
    (folder / "config.json").write_text(json.dumps(config))


def test_c_radio_gives_its_features_and_one_vector_of_summaries(radio: Radio) -> None:
    taps = {"patches": "features", "summary": "summary"}
    teacher = load(**radio.keys, taps=taps)
    assert teacher.preprocessing.mean == (0, 0, 0)
    assert teacher.preprocessing.std == (1, 1, 1)
    found, (summary_BD, features_BTD) = teacher(images(32)), radio.oracle()
    assert_same(found["patches"], features_BTD)
    assert_same(found["summary"], summary_BD[:, None])
    assert teacher.outputs["patches"].grid == (4, 4)


def test_outputs_without_names_are_tapped_by_number(radio: Radio) -> None:
    write_config(radio.folder, named=False)
    taps = {"patches": "1", "summary": "0"}
    found = load(**radio.keys, taps=taps)(images(32))
    assert_same(found["patches"], radio.oracle()[1])
    assert_same(found["summary"], radio.oracle()[0][:, None])


def test_c_radio_without_taps_is_refused_with_those_it_has(radio: Radio) -> None:
    sentence = "...'last_hidden_state' is not an output of this model; it has summary, features..."
    refuses(sentence, load, **radio.keys)


def test_code_of_another_repository_is_refused(radio: Radio) -> None:
    # It could change without a change of the digest.
    write_config(radio.folder, auto_map={"AutoConfig": "radio_code.Configuration", "AutoModel": "org/name--code.Model"})
    refuses("...auto_map ...'org/name--code.Model', code of another repository; copy it...", load, **radio.keys)


def test_sam_before_its_neck_is_a_hidden_state(tmp_path: Path) -> None:
    model = save_checkpoint(tmp_path, "sam_vision_model", SAM)
    teacher = load(source="transformers", model=str(tmp_path), taps={"patches": "hidden_states.-1"}, **GIVEN)
    with torch.inference_mode():
        given = pixels(images(32), GIVEN["mean"], GIVEN["std"])
        found = model(pixel_values=given, output_hidden_states=True)
        neck_BDRC = model.vision_encoder.neck(found.hidden_states[-1])
    patches = teacher(images(32))["patches"]
    assert_same(patches, found.hidden_states[-1].flatten(1, 2))
    assert teacher.outputs["patches"].dim == SAM["hidden_size"] != SAM["output_channels"]
    assert_same(neck_BDRC, found.last_hidden_state)  # so it is what the neck is given
