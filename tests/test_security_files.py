"""Files from strangers: an index and checkpoints that were damaged, or made to do harm, are refused with words."""

from __future__ import annotations

import json
import os
import pickle
import random
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hf_models
import numpy as np
import pyarrow as pa
import pytest
import tiny_synthesis
import torch
from safetensors.torch import save_file

from llmvis.index import Index, IndexInfo, build, open_index
from llmvis.models.language_model import language_model_folder
from llmvis.models.load import load_encoder
from llmvis.models.load_restorer import load_picture_restorer
from llmvis.models.restorer import Restorer, RestorerConfig, save_restorer
from llmvis.models.synthesizer_files import load_synthesizer
from llmvis.models.tokenizer_files import load_tokenizer
from llmvis.models.two_tower import TextEncoder, load_two_tower
from llmvis.models.two_tower_info import default_folder
from llmvis.schema import UserError
from llmvis.storage import LocalStore, StorageError, sha256_bytes
from llmvis.training.common import load_state
from llmvis.training.restore import RestoreStage
from tests.test_index import DIM, MODEL, table, unit

FLIPS = 200


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An index of two builds: two shards, captions in its metadata."""
    path = tmp_path_factory.mktemp("index") / "good"
    vectors = unit(30)
    for at, add in ((0, False), (20, True)):
        rows = table(vectors[at : at + 20 - at // 2], at)
        rows = rows.append_column("caption", pa.array([f"a picture {i}" for i in range(rows.num_rows)]))
        build(LocalStore(path), IndexInfo(model=MODEL, source={"kind": "folder"}), [rows], add=add)
    return path


def in_force(index: Path) -> list[Path]:
    """The files that the current version is made of, less CURRENT itself."""
    version = (index / "CURRENT").read_text().split()[0]
    return [index / "manifests" / f"{version}.json", *sorted((index / "shards").iterdir())]


def test_two_hundred_flipped_bits_are_all_refused(index: Path, tmp_path: Path) -> None:
    """Seeded, over all files in turn: CURRENT, manifest, vectors, metadata. None opens, none crashes."""
    dice, refused, touched = random.Random(20260), 0, set[str]()
    files = [p.relative_to(index) for p in (index / "CURRENT", *in_force(index))]
    assert len(files) == 6, "one CURRENT, one manifest, two shards of two files"
    for trial in range(FLIPS):
        bad, name = tmp_path / "bad", files[trial % len(files)]
        shutil.copytree(index, bad)
        data = bytearray((bad / name).read_bytes())
        bit = dice.randrange(8 * len(data))
        data[bit // 8] ^= 1 << bit % 8
        (bad / name).write_bytes(bytes(data))
        try:
            open_index(str(bad), MODEL["fingerprint"]).close()
        except StorageError:
            refused += 1
        touched.add(str(name))
        shutil.rmtree(bad)
    assert refused == FLIPS and len(touched) == 6
    open_index(str(index), MODEL["fingerprint"]).close()  # undamaged, it opens


def signed(index: Path, bad: Path, change: Callable[[dict[str, Any], Path], None]) -> Index:
    """Opens a copy that whoever can write an index has changed, and given right hashes."""
    shutil.copytree(index, bad)
    file = in_force(bad)[0]
    manifest = json.loads(file.read_text())
    change(manifest, bad)
    data = json.dumps(manifest).encode()
    file.write_bytes(data)
    (bad / "CURRENT").write_bytes(f"{file.stem} {sha256_bytes(data)}\n".encode())
    return open_index(str(bad))


def put(manifest: dict[str, Any], part: str, data: bytes, root: Path) -> None:
    """Other bytes for the first shard's part, with their hash."""
    file = manifest["shards"][0][part]
    (root / file["name"]).write_bytes(data)
    file |= {"sha256": sha256_bytes(data), "bytes": len(data)}


def outside(name: str) -> Callable[[dict[str, Any], Path], None]:
    def change(manifest: dict[str, Any], root: Path) -> None:
        manifest["shards"][0]["vectors"]["name"] = name

    return change


def npy(descr: str, shape: str, body: bytes = b"\0" * 960) -> bytes:
    """A NumPy file with a header of one's own."""
    header = f"{{'descr': {descr}, 'fortran_order': False, 'shape': {shape}, }}".encode().ljust(117) + b"\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header + body


def objects(mark: Path) -> bytes:
    return npy("'|O'", f"(20, {DIM})", pickle.dumps(Payload(mark)))


class Payload:
    """What runs when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.mark),)


def counts(rows: object) -> Callable[[dict[str, Any], Path], None]:
    def change(manifest: dict[str, Any], root: Path) -> None:
        manifest["shards"][0]["rows"] = rows
        manifest["rows"] = rows + 10 if isinstance(rows, int) else rows

    return change


def changed(*keys: Any, to: object) -> Callable[[dict[str, Any], Path], None]:
    def change(manifest: dict[str, Any], root: Path) -> None:
        place: Any = manifest
        for key in keys[:-1]:
            place = place[key]
        place[keys[-1]] = to

    return change


HARM: dict[str, tuple[Callable[[dict[str, Any], Path], None], str]] = {
    "climbs out": (outside("../../etc/passwd"), "said to lie in"),
    "absolute": (outside("/etc/passwd"), "said to lie in"),
    "climbs in the middle": (outside("shards/../../secret.npy"), "said to lie in"),
    "a line break": (outside("shards/000001-00000.npy\n"), "said to lie in"),
    "name is no text": (changed("shards", 0, "metadata", "name", to=["x"]), "said to lie in"),
    "a trillion rows": (counts(10**12), "not float16"),
    "minus a row": (counts(-1), "no number of rows"),
    "a row and a half": (counts(1.5), "no number of rows"),
    "rows are true": (counts(True), "no number of rows"),
    "sum is wrong": (changed("rows", to=7), "counts 7 rows for 30"),
    "no dimension": (changed("model", "dim", to=0), "no model with a dimension"),
    "huge dimension": (changed("model", "dim", to=10**15), "not float16"),
    "no model": (changed("model", to=None), "no model"),
    "no fingerprint": (changed("model", "fingerprint", to=3), "no name and fingerprint"),
    "no such source": (changed("shards", 0, "source", to=9), "of source 9"),
    "no sources": (changed("sources", to="x"), "no list of sources"),
    "no shards": (changed("shards", to={}), "no list of shards"),
    "a shard is a text": (changed("shards", 0, to="shard"), "no number of rows"),
    "no hash": (changed("shards", 0, "vectors", "sha256", to=None), "no hash"),
    "objects in the vectors": (
        lambda m, root: put(m, "vectors", objects(root.parent / "it ran"), root), "cannot be read"
    ),
    "shape of a petabyte": (
        lambda m, root: put(m, "vectors", npy("'<f2'", f"({10**12}, {DIM})"), root), "cannot be read"
    ),
    "header is an expression": (
        lambda m, root: put(m, "vectors", npy("__import__('os').getpid()", "(20, 24)"), root), "cannot be read"
    ),
    "other numbers": (lambda m, root: put(m, "vectors", npy("'<i2'", f"(20, {DIM})"), root), "not float16"),
    "no NumPy at all": (lambda m, root: put(m, "vectors", b"MZ" * 50, root), "cannot be read"),
    "metadata are no Arrow": (lambda m, root: put(m, "metadata", b"ARROW1\0\0" + b"\xff" * 99, root), "cannot be read"),
}  # fmt: skip


@pytest.mark.parametrize("harm", HARM)
def test_a_changed_index_with_right_hashes_is_refused_with_words(
    index: Path, tmp_path: Path, harm: str
) -> None:
    change, words = HARM[harm]
    with pytest.raises(StorageError, match=words):
        signed(index, tmp_path / "bad", change)
    assert not (tmp_path / "it ran").exists()


def test_the_index_opens_when_the_change_is_none(index: Path, tmp_path: Path) -> None:
    """The refusals above are of what was changed, not of being signed anew."""
    assert signed(index, tmp_path / "same", lambda manifest, root: None).rows == 30
    with pytest.raises(ValueError, match=r"Python objects|allow_pickle"):
        (tmp_path / "x.npy").write_bytes(objects(tmp_path / "it ran"))
        np.load(tmp_path / "x.npy", mmap_mode="r")
    np.load(tmp_path / "x.npy", allow_pickle=True)  # and the payload is a real one
    assert (tmp_path / "it ran").exists()


# Checkpoints


def broken_headers() -> dict[str, bytes]:
    """Safetensors that lie in their first bytes."""
    table = json.dumps({"a": {"dtype": "F32", "shape": [2**40], "data_offsets": [0, 2**42]}}).encode()
    return {
        "empty": b"",
        "header longer than the file": struct.pack("<Q", 2**60) + b"{}",
        "header is no JSON": struct.pack("<Q", 8) + b"\xff" * 8,
        "tensor beyond the end": struct.pack("<Q", len(table)) + table,
        "a pickle by another name": pickle.dumps({"weight": 1}),
    }


def clip(folder: Path) -> Callable[[], object]:
    hf_models.save_clip(folder)
    return lambda: load_encoder(str(folder))


def two_tower(folder: Path) -> Callable[[], object]:
    shutil.copytree(default_folder(), folder)
    return lambda: load_two_tower(folder)


def two_tower_by_name(folder: Path) -> Callable[[], object]:
    shutil.copytree(default_folder(), folder)
    return lambda: load_encoder(str(folder))


def text_encoder(folder: Path) -> Callable[[], object]:
    shutil.copytree(language_model_folder(), folder)
    return lambda: TextEncoder(language_model_folder(folder))(["a word"])


def tokenizer(folder: Path) -> Callable[[], object]:
    tiny_synthesis.save(folder.parent / "model")
    shutil.move(folder.parent / "model" / "tokenizer", folder)
    return lambda: load_tokenizer(folder)


def language(folder: Path) -> Callable[[], object]:
    tiny_synthesis.save(folder.parent / "model")
    shutil.move(folder.parent / "model" / "language", folder)
    (folder.parent / "model" / "language").symlink_to(folder)
    return lambda: load_synthesizer(folder.parent / "model")


def restorer(folder: Path) -> Callable[[], object]:
    save_restorer(Restorer(RestorerConfig()), folder.parent / "model" / "restorer")
    shutil.move(folder.parent / "model" / "restorer", folder)
    (folder.parent / "model" / "restorer").symlink_to(folder)
    return lambda: load_picture_restorer(str(folder.parent / "model"))


LOADERS = [clip, two_tower, two_tower_by_name, text_encoder, tokenizer, language, restorer]
WEIGHTS = "model.safetensors"


@pytest.mark.parametrize("make", LOADERS, ids=lambda make: make.__name__)
def test_a_loader_refuses_damaged_weights_pickles_and_foreign_keys(
    tmp_path: Path, make: Callable[[Path], Callable[[], object]]
) -> None:
    folder, mark = tmp_path / "checkpoint", tmp_path / "it ran"
    load = make(folder)
    load()  # as it is, it opens
    payload = pickle.dumps(Payload(mark))
    for name in ("pytorch_model.bin", "model.pt", "training_args.bin", "data.pkl"):
        (folder / name).write_bytes(payload)
    load()  # beside safetensors a pickle is nothing
    whole = (folder / WEIGHTS).read_bytes()
    for name, data in broken_headers().items():
        (folder / WEIGHTS).write_bytes(data)
        with pytest.raises(UserError, match=r"safetensors|can't be opened|can't be read"):
            load()
        assert not mark.exists(), name
    save_file({"stranger": torch.zeros(3)}, folder / WEIGHTS, metadata={"format": "pt"})
    if make is not text_encoder:  # transformers fills in what lacks there, and says so
        with pytest.raises(UserError, match=r"fit|lacks"):
            load()
    (folder / WEIGHTS).unlink()
    if make is restorer:  # a model without one takes the packaged
        load()
    else:
        with pytest.raises(UserError, match=r"pickle|needs config.json and model.safetensors"):
            load()
    (folder / WEIGHTS).write_bytes(whole)
    if make not in (clip, text_encoder):
        config = json.loads((folder / "config.json").read_text())
        for key in ("auto_map", "trust_remote_code"):
            (folder / "config.json").write_text(json.dumps(config | {key: {"AutoModel": "evil.Model"}}))
            with pytest.raises(UserError, match=f"does not fit this version.*{key}"):
                load()
    assert not mark.exists()
    pickle.loads(payload)  # the payload is a real one
    assert mark.exists()


@pytest.mark.parametrize("shard", ["../elsewhere.safetensors", "pytorch_model.bin", "/etc/passwd", 7])
@pytest.mark.parametrize("make", [clip, text_encoder], ids=lambda make: make.__name__)
def test_an_index_of_shards_names_safetensors_beside_it_and_nothing_else(
    tmp_path: Path, make: Callable[[Path], Callable[[], object]], shard: object
) -> None:
    load = make(tmp_path / "checkpoint")
    (tmp_path / "checkpoint" / WEIGHTS).rename(tmp_path / "elsewhere.safetensors")
    (tmp_path / "checkpoint" / "pytorch_model.bin").write_bytes(pickle.dumps(Payload(tmp_path / "it ran")))
    told = {"metadata": {}, "weight_map": {"logit_scale": shard}}
    (tmp_path / "checkpoint" / "model.safetensors.index.json").write_text(json.dumps(told))
    with pytest.raises(UserError, match="and nothing else"):
        load()
    assert not (tmp_path / "it ran").exists()


def test_a_language_model_with_a_program_of_its_own_is_refused(tmp_path: Path) -> None:
    """Also where somebody sits at the terminal: transformers would ask whether to run it."""
    folder, mark = tmp_path / "checkpoint", tmp_path / "it ran"
    load = text_encoder(folder)
    (folder / "evil.py").write_text(
        f"import os\nos.mkdir({str(mark)!r})\nclass Config: pass\nModel = Config\n"
    )
    config = json.loads((folder / "config.json").read_text())
    config |= {
        "model_type": "evil",
        "auto_map": {"AutoConfig": "evil.Config", "AutoModel": "evil.Model"},
    }
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="program code of its own"):
        load()
    assert not mark.exists()


class SmallStage(RestoreStage):
    """A stage with its state and no pictures: what resuming needs."""

    def __init__(self) -> None:
        self.net = torch.nn.Linear(2, 2)

    def fingerprint(self) -> dict[str, Any]:
        return {"of": "test"}

    def tensors(self) -> dict[str, torch.Tensor]:
        return dict(self.net.state_dict())

    def load(self, tensors: Any) -> None:
        self.net.load_state_dict(dict(tensors))


def test_a_training_goes_on_from_safetensors_only(tmp_path: Path) -> None:
    """`load_state` is what a run alone and a worker of Ray Train go on by."""
    mark, state = tmp_path / "it ran", tmp_path / "state"
    state.mkdir()
    told = {"step": 3, "fingerprint": {"of": "test"}}
    (state / "state.json").write_text(json.dumps(told))
    for name in ("state.pt", "checkpoint.pkl", "state.bin"):
        (state / name).write_bytes(pickle.dumps(Payload(mark)))
    with pytest.raises(UserError, match=r"state\.safetensors is missing; .*state\.pt beside it is pickle"):
        load_state(SmallStage(), state)
    for data in broken_headers().values():
        (state / "state.safetensors").write_bytes(data)
        with pytest.raises(UserError, match="no whole safetensors file"):
            load_state(SmallStage(), state)
    save_file({"stranger": torch.zeros(1)}, state / "state.safetensors")
    with pytest.raises(UserError, match="not of this run"):
        load_state(SmallStage(), state)
    save_file(SmallStage().tensors(), state / "state.safetensors")
    assert load_state(SmallStage(), state) == 3
    for bad in ({"step": "3"}, {"fingerprint": None}):
        (state / "state.json").write_text(json.dumps(told | bad))
        with pytest.raises(UserError, match="no state of a run"):
            load_state(SmallStage(), state)
    (state / "state.json").write_text("cos\nsystem\n")
    with pytest.raises(UserError, match="not JSON"):
        load_state(SmallStage(), state)
    assert not mark.exists()
