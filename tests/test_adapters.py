"""Real CLIP, SigLIP, AltCLIP and Chinese-CLIP checkpoints through the Encoder protocol."""

from __future__ import annotations

import json
import pickle
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoImageProcessor, AutoModel, AutoTokenizer

from llmvis.models.adapters import TransformersEncoder
from llmvis.models.load import describe_encoder, load_encoder
from llmvis.models.processor import EncoderError, ProcessorPreprocess
from llmvis.models.protocols import Encoder, EncoderInfo
from tests import hf_models
from tests.catalogue import photo

ROOT = Path(__file__).parents[1]
PICTURES = [photo(w, h, seed=w) for w, h in ((96, 64), (33, 90), (32, 32), (7, 9), (200, 41), (64, 64))]
DIMENSIONS = {"clip": 24, "siglip": 32, "altclip": 24, "chinese_clip": 24}
LONG = "many words about flowers and gardens " * 300


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("hf")
    return {name: save(root / name) for name, save in hf_models.FAMILIES.items()}


@pytest.fixture(scope="session")
def encoders(folders: dict[str, Path]) -> dict[str, TransformersEncoder]:
    return {name: TransformersEncoder(f, describe_encoder(str(f))) for name, f in folders.items()}


@pytest.fixture
def clip(folders: dict[str, Path], tmp_path: Path) -> Path:
    """A copy of the CLIP folder, to be spoilt."""
    return Path(shutil.copytree(folders["clip"], tmp_path / "clip"))


families = pytest.mark.parametrize("family", hf_models.FAMILIES)


def stacked(info: EncoderInfo) -> np.ndarray:
    return np.stack([info.preprocess(p) for p in PICTURES])


def unit(features: Any) -> np.ndarray:
    rows = (features if isinstance(features, torch.Tensor) else features.pooler_output).detach().numpy()
    return np.asarray(rows / np.linalg.norm(rows, axis=1, keepdims=True))


@families
def test_described_is_what_is_loaded(
    family: str, folders: dict[str, Path], encoders: dict[str, TransformersEncoder]
) -> None:
    encoder: Encoder = encoders[family]
    assert isinstance(encoder, Encoder)
    info = describe_encoder(str(folders[family]))
    assert (info.dim, info.fingerprint) == (DIMENSIONS[family], encoder.info.fingerprint)
    assert Path(info.name) == folders[family].resolve()
    assert info.preprocess.side == 32
    assert load_encoder(str(folders[family])).info.fingerprint == info.fingerprint


def test_describing_imports_no_torch(folders: dict[str, Path]) -> None:
    code = """
import pickle, sys
from llmvis.models.load import describe_encoder
infos = [describe_encoder(name) for name in sys.argv[1:]]
sides = [i.preprocess.side for i in pickle.loads(pickle.dumps(infos))]
print(sides, sorted({"torch", "transformers", "ray"} & set(sys.modules)))
"""
    names = [str(f) for f in folders.values()]
    done = subprocess.run([sys.executable, "-c", code, *names], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout.strip() == "[32, 32, 32, 32] []", done.stderr


@families
def test_both_halves_of_preprocessing_equal_the_processor(
    family: str, folders: dict[str, Path], encoders: dict[str, TransformersEncoder]
) -> None:
    processor = AutoImageProcessor.from_pretrained(folders[family], backend="pil")
    wanted = processor(PICTURES, return_tensors="pt")["pixel_values"]
    small = stacked(encoders[family].info)
    assert small.dtype == np.uint8 and small.shape == (len(PICTURES), 32, 32, 3)
    found = encoders[family]._pixels(small)
    assert torch.allclose(found, wanted, atol=1e-6, rtol=1e-5)
    assert found.std() > 0.1  # not a constant


@families
def test_image_embeddings_are_the_models_own(
    family: str, folders: dict[str, Path], encoders: dict[str, TransformersEncoder]
) -> None:
    processor = AutoImageProcessor.from_pretrained(folders[family], backend="pil")
    model = AutoModel.from_pretrained(folders[family]).eval()
    with torch.inference_mode():
        wanted = unit(model.get_image_features(**processor(PICTURES, return_tensors="pt")))
    found = encoders[family].encode_images(stacked(encoders[family].info))
    assert found.dtype == np.float32
    assert np.allclose(found, wanted, atol=1e-5)
    assert np.ptp(found, axis=0).max() > 0.05  # pictures differ


@families
def test_text_embeddings_are_the_models_own(
    family: str, folders: dict[str, Path], encoders: dict[str, TransformersEncoder]
) -> None:
    """Against the documented way to call each model, one text at a time."""
    tokenizer = AutoTokenizer.from_pretrained(folders[family])
    model = AutoModel.from_pretrained(folders[family]).eval()
    texts = [t.lower() for t in hf_models.TEXTS.values()]
    padding = {"padding": "max_length", "max_length": 64} if family == "siglip" else {}
    found = encoders[family].encode_texts(texts)
    with torch.inference_mode():
        for text, row in zip(texts, found, strict=True):
            tokens = tokenizer([text], return_tensors="pt", **padding)
            assert np.allclose(row, unit(model.get_text_features(**tokens))[0], atol=1e-5), text


@families
def test_rows_are_unit_length_and_do_not_depend_on_the_batch(
    family: str, encoders: dict[str, TransformersEncoder]
) -> None:
    encoder = encoders[family]
    texts = [f"{t} {'more ' * (i % 7)}{i}" for i in range(25) for t in hf_models.TEXTS.values()]
    assert len(texts) > 128  # more than one batch inside
    for rows, alone in (
        (encoder.encode_texts(texts), [encoder.encode_texts([t])[0] for t in texts]),
        (encoder.encode_images(p := stacked(encoder.info)), [encoder.encode_images(x[None])[0] for x in p]),
    ):
        assert rows.dtype == np.float32 and rows.shape == (len(alone), encoder.info.dim)
        assert np.allclose(np.linalg.norm(rows, axis=1), 1, atol=1e-5)
        assert np.allclose(rows, alone, atol=1e-5)
    assert np.array_equal(encoder.encode_texts(texts), encoder.encode_texts(texts))


@families
def test_any_text_is_taken(family: str, encoders: dict[str, TransformersEncoder]) -> None:
    texts = ["", " ", "\0", "\ud800", "🌹" * 50, LONG, LONG + "tail", "שלום", "a\nb"]
    rows = encoders[family].encode_texts(texts)
    assert np.isfinite(rows).all()
    assert np.allclose(rows[5], rows[6], atol=1e-6)  # cut before the tail
    assert not np.allclose(rows[4], rows[5], atol=1e-3)


@pytest.mark.parametrize("family", hf_models.MULTILINGUAL)
def test_six_languages_reach_the_text_tower(family: str, encoders: dict[str, TransformersEncoder]) -> None:
    encoder = encoders[family]
    texts = list(hf_models.TEXTS.values())
    unknown = encoder._tokenizer.unk_token_id
    for text in texts:
        tokens = encoder._tokens([text])["input_ids"][0].tolist()
        assert len(set(tokens)) > 5 and unknown not in tokens, text
    rows = encoder.encode_texts(texts)
    gaps = np.abs(rows[:, None] - rows[None]).max(-1)[~np.eye(6, dtype=bool)]
    assert gaps.min() > 1e-3


def test_siglip_texts_are_padded_in_full_lower_cased_and_unmasked(
    encoders: dict[str, TransformersEncoder],
) -> None:
    tokens = encoders["siglip"]._tokens(["A Red Flower"])
    assert set(tokens) == {"input_ids"} and tokens["input_ids"].shape == (1, 64)
    assert torch.equal(tokens["input_ids"], encoders["siglip"]._tokens(["a red flower"])["input_ids"])


def test_empty_batches_and_wrong_arrays(encoders: dict[str, TransformersEncoder]) -> None:
    encoder = encoders["clip"]
    assert encoder.encode_texts([]).shape == (0, 24)
    assert encoder.encode_images(np.zeros((0, 32, 32, 3), np.uint8)).shape == (0, 24)
    for wrong in (np.zeros((2, 32, 32, 3), np.float32), np.zeros((2, 3, 32, 32), np.uint8)):
        with pytest.raises(ValueError, match=r"uint8 \(B, H, W, 3\)"):
            encoder.encode_images(wrong)


def test_read_only_arrays_are_taken(encoders: dict[str, TransformersEncoder]) -> None:
    pictures = stacked(encoders["clip"].info)
    wanted = encoders["clip"].encode_images(pictures)
    pictures.flags.writeable = False  # as from Ray's object store
    assert np.array_equal(encoders["clip"].encode_images(pictures), wanted)


def test_half_precision_stays_close(
    folders: dict[str, Path], encoders: dict[str, TransformersEncoder]
) -> None:
    half = load_encoder(str(folders["clip"]), dtype="bfloat16")
    pictures = stacked(half.info)
    found = half.encode_images(pictures)
    assert found.dtype == np.float32 and np.allclose(np.linalg.norm(found, axis=1), 1, atol=1e-5)
    assert ((found * encoders["clip"].encode_images(pictures)).sum(1) > 0.99).all()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_cuda_agrees_with_cpu(
    dtype: Any, folders: dict[str, Path], encoders: dict[str, TransformersEncoder]
) -> None:
    gpu = load_encoder(str(folders["clip"]), device="cuda", dtype=dtype)
    texts = list(hf_models.TEXTS.values())
    assert ((gpu.encode_texts(texts) * encoders["clip"].encode_texts(texts)).sum(1) > 0.99).all()


def test_preprocessing_travels_light_and_works_after_use() -> None:
    settings = {"image_processor_type": "CLIPImageProcessor", "size": {"shortest_edge": 40}, "crop_size": 30}
    preprocess = ProcessorPreprocess(settings, "clip")
    before = pickle.dumps(preprocess)
    wanted = preprocess(PICTURES[0])
    assert wanted.shape == (30, 30, 3) and preprocess.side == 40
    after = pickle.dumps(preprocess)
    assert len(after) == len(before) < 1000
    assert np.array_equal(pickle.loads(after)(PICTURES[0]), wanted)


def test_settings_as_transformers_4_wrote_them(clip: Path, folders: dict[str, Path]) -> None:
    saved = json.loads((clip / "processor_config.json").read_text())["image_processor"]
    old = {k: saved[k] for k in ("do_resize", "do_center_crop", "do_normalize", "image_mean", "image_std")}
    old |= {"feature_extractor_type": "CLIPFeatureExtractor", "size": 32, "crop_size": 32, "resample": 3}
    (clip / "processor_config.json").unlink()
    (clip / "preprocessor_config.json").write_text(json.dumps(old))
    info, now = describe_encoder(str(clip)), describe_encoder(str(folders["clip"]))
    assert info.preprocess.side == 32
    assert np.array_equal(stacked(info), stacked(now))


def test_a_sliver_does_not_explode(folders: dict[str, Path]) -> None:
    """1 x 60000 pixels would be 32 x 1.9 million after resizing the shortest edge."""
    preprocess = describe_encoder(str(folders["clip"])).preprocess
    sizes: list[tuple[int, int]] = []
    assert isinstance(preprocess, ProcessorPreprocess)
    resize = preprocess.processor.resize
    preprocess.processor.resize = lambda image, **kw: sizes.append(image.shape) or resize(image=image, **kw)
    assert preprocess(Image.new("RGB", (1, 60_000), "red")).shape == (32, 32, 3)
    assert sizes == [(3, 32, 1)]
    del preprocess.processor.resize
    sliver = photo(20, 1400)
    direct = preprocess.processor(sliver, do_rescale=False, do_normalize=False, return_tensors="np")
    assert np.array_equal(preprocess(sliver), direct["pixel_values"][0].transpose(1, 2, 0))


def test_another_dimension_than_described_is_refused(folders: dict[str, Path]) -> None:
    told = describe_encoder(str(folders["clip"]))
    wrong = EncoderInfo(name="x", fingerprint=told.fingerprint, dim=25, preprocess=told.preprocess)
    with pytest.raises(EncoderError, match=r"says 25 dimensions.*24 for pictures and 24 for texts"):
        TransformersEncoder(folders["clip"], wrong)


def test_sentencepiece_tokenizer_of_siglip(folders: dict[str, Path], tmp_path: Path) -> None:
    """google/siglip-* ship spiece.model, which wants the package sentencepiece."""
    sentencepiece = pytest.importorskip("sentencepiece", reason="the package sentencepiece is not installed")
    from transformers import SiglipTokenizer

    folder = Path(shutil.copytree(folders["siglip"], tmp_path / "siglip"))
    for file in folder.glob("tokenizer*"):
        file.unlink()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(list(hf_models.TEXTS.values()) * 20),
        model_prefix=str(tmp_path / "spiece"),
        vocab_size=120,
        hard_vocab_limit=False,
        pad_id=-1,
        bos_id=-1,
        eos_id=1,
        unk_id=2,
        minloglevel=2,
    )
    tokenizer = SiglipTokenizer(str(tmp_path / "spiece.model"), model_input_names=["input_ids"])
    tokenizer.save_pretrained(folder)
    encoder = load_encoder(str(folder))
    found = encoder.encode_texts(["A red, flower!", "a red flower", "a blue car"])
    assert np.allclose(found[0], found[1], atol=1e-6) and not np.allclose(found[1], found[2], atol=1e-3)
