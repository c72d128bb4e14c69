"""Names and folders → encoders: fingerprints, and every kind of checkpoint that must be refused."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoTokenizer, CLIPVisionConfig, CLIPVisionModel

from llmvis.models.load import describe_encoder, load_encoder
from llmvis.models.processor import EncoderError
from tests import hf_models

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return hf_models.save_clip(tmp_path_factory.mktemp("hf") / "clip")


@pytest.fixture
def clip(saved: Path, tmp_path: Path) -> Path:
    """A copy of a CLIP folder, to be spoilt."""
    return Path(shutil.copytree(saved, tmp_path / "clip"))


def test_fingerprint_follows_what_changes_embeddings(clip: Path, saved: Path) -> None:
    seen = {describe_encoder(str(clip)).fingerprint}
    assert seen == {describe_encoder(str(saved)).fingerprint}  # wherever the folder is
    (clip / "README.md").write_text("---\nlicense: mit\ntags: []\n---\n# A model\nlicense: none\n")
    (clip / "training_args.json").write_text("{}")
    assert describe_encoder(str(clip)).fingerprint in seen
    assert describe_encoder(str(clip)).licence == "mit"
    weights = (clip / "model.safetensors").read_bytes()
    changes = {
        "model.safetensors": weights[:-1] + bytes([weights[-1] ^ 1]),
        "processor_config.json": (clip / "processor_config.json").read_bytes() + b" ",
        "tokenizer.json": (clip / "tokenizer.json").read_bytes() + b" ",
        "vocab.txt": b"one more file",
    }
    for name, content in changes.items():
        (clip / name).write_bytes(content)
        seen.add(describe_encoder(str(clip)).fingerprint)
    assert len(seen) == 1 + len(changes)


def test_sharded_weights_load_and_a_missing_shard_is_named(clip: Path, saved: Path) -> None:
    wanted = load_encoder(str(saved)).encode_texts(["a red flower"])
    AutoModel.from_pretrained(clip).save_pretrained(clip, max_shard_size="60KB")
    (clip / "model.safetensors").unlink()
    shards = sorted(clip.glob("model-*.safetensors"))
    assert len(shards) > 1
    assert np.allclose(load_encoder(str(clip)).encode_texts(["a red flower"]), wanted, atol=1e-6)
    shards[0].unlink()
    with pytest.raises(EncoderError, match=shards[0].name):
        describe_encoder(str(clip))


class Payload:
    """What runs when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


def test_pickled_weights_are_refused_and_never_opened(clip: Path, tmp_path: Path) -> None:
    mark = tmp_path / "it ran"
    (clip / "pytorch_model.bin").write_bytes(pickle.dumps(Payload(mark)))
    load_encoder(str(clip))  # beside safetensors: ignored
    (clip / "model.safetensors").unlink()
    for load in (describe_encoder, load_encoder):
        with pytest.raises(EncoderError, match=r"pytorch_model.bin: pickle.*save_pretrained"):
            load(str(clip))
    assert not mark.exists()
    pickle.loads((clip / "pytorch_model.bin").read_bytes())
    assert mark.exists()


def test_a_checkpoints_own_code_is_never_run(clip: Path, tmp_path: Path) -> None:
    mark = tmp_path / "it ran"
    (clip / "custom.py").write_text(f"import os\nos.mkdir({str(mark)!r})\nclass Own: pass\n")
    for name, entry in (
        ("config.json", {"AutoModel": "custom.Own", "AutoConfig": "custom.Own"}),
        ("tokenizer_config.json", {"AutoTokenizer": ["custom.Own", None]}),
    ):
        content = json.loads((clip / name).read_text()) | {"auto_map": entry}
        (clip / name).write_text(json.dumps(content))
    load_encoder(str(clip))  # transformers' own classes
    settings = json.loads((clip / "processor_config.json").read_text())
    settings["image_processor"] |= {
        "image_processor_type": "Own",
        "auto_map": {"AutoImageProcessor": "custom.Own"},
    }
    (clip / "processor_config.json").write_text(json.dumps(settings))
    with pytest.raises(EncoderError, match="runs no program of a checkpoint's own"):
        load_encoder(str(clip))
    assert not mark.exists()


def test_weights_that_lack_a_part_are_refused(clip: Path) -> None:
    weights = load_file(clip / "model.safetensors")
    del weights["visual_projection.weight"]
    save_file(weights, clip / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(EncoderError, match=r"lacks 1 of the weights .*visual_projection.weight"):
        load_encoder(str(clip))


def test_a_cut_off_weights_file_is_refused(clip: Path) -> None:
    whole = (clip / "model.safetensors").read_bytes()
    (clip / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(EncoderError, match="can't be read"):
        load_encoder(str(clip))


def test_a_vision_tower_alone_is_refused(clip: Path) -> None:
    tower = CLIPVisionModel(CLIPVisionConfig(**hf_models._VISION, projection_dim=24))
    tower.save_pretrained(clip)
    with pytest.raises(EncoderError, match="has no get_image_features"):
        load_encoder(str(clip))


def test_patches_are_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(EncoderError, match=r"Siglip2ImageProcessor can't be used.*patches"):
        describe_encoder(str(hf_models.save_naflex(tmp_path)))


def test_pictures_of_changing_size_are_refused_by_name(clip: Path) -> None:
    settings = json.loads((clip / "processor_config.json").read_text())
    settings["image_processor"]["do_center_crop"] = False
    (clip / "processor_config.json").write_text(json.dumps(settings))
    with pytest.raises(EncoderError, match=r"CLIPImageProcessor can't be used: the size"):
        load_encoder(str(clip))


def test_incomplete_folders_say_what_is_missing(clip: Path, tmp_path: Path) -> None:
    for file, words in (
        ("processor_config.json", "no image processor"),
        ("model.safetensors", "no model.safetensors"),
        ("config.json", "no config.json"),
    ):
        (clip / file).unlink()
        with pytest.raises(EncoderError, match=words):
            describe_encoder(str(clip))
    for name in ("./nowhere", str(tmp_path / "nowhere"), "a/b/c", "~/nowhere", ""):
        with pytest.raises(EncoderError, match="no folder"):
            describe_encoder(name)


def test_a_missing_tokenizer_says_so(clip: Path) -> None:
    """transformers 5 would quietly make one of three words."""
    (clip / "tokenizer.json").unlink()
    assert len(AutoTokenizer.from_pretrained(clip)) < 10
    with pytest.raises(EncoderError, match="no tokenizer"):
        describe_encoder(str(clip))


def test_a_broken_tokenizer_says_so(clip: Path) -> None:
    whole = (clip / "tokenizer.json").read_bytes()
    (clip / "tokenizer.json").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(EncoderError, match="tokenizer can't be loaded"):
        load_encoder(str(clip))


def test_a_model_of_another_kind_is_refused(clip: Path) -> None:
    (clip / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
    with pytest.raises(EncoderError, match=r"'gpt2'.*such as .*siglip"):
        describe_encoder(str(clip))


def test_without_a_connection_the_error_says_how_to_get_the_model(tmp_path: Path) -> None:
    code = "from llmvis.models.load import describe_encoder; describe_encoder('openai/clip-vit-base-patch32')"
    environment = os.environ | {"HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, env=environment
    )
    assert done.returncode == 1
    assert "EncoderError" in done.stderr and "hf download openai/clip-vit-base-patch32" in done.stderr
