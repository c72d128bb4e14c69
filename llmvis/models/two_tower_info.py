"""What a folder of two-tower weights says of itself, read without torch.

A folder holds `config.json` (sizes, preprocessing, the mix of the two parts, the language
model's name) and `model.safetensors`. The driver plans with this; the weights are loaded
in actors, by `llmvis.models.two_tower`.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path

from llmvis.models.files import make_config, read_json
from llmvis.models.language_model import PACKAGED, language_model_files, language_model_folder
from llmvis.models.preprocess import Mode, SquarePreprocess
from llmvis.models.protocols import EncoderInfo
from llmvis.schema import UserError

CONFIG, WEIGHTS = "config.json", "model.safetensors"
MODEL_TYPE = "llmvis-two-tower"


@dataclass(frozen=True, kw_only=True)
class TwoTowerConfig:
    """Sizes and choices of a two-tower encoder; everything else is in the weights.

    semantic_share: share of the cosine that the class-name part decides, 0..1.
    temperature: of the class probabilities in the class-name part.
    hidden: width of the learned part's residual MLP; 0 leaves a linear map.
    """

    model_type: str = MODEL_TYPE
    name: str = "llmvis/two-tower"
    image_size: int = 224
    mode: Mode = "fit"
    language_model: str = PACKAGED
    text_dim: int = 384
    learned_dim: int = 384
    hidden: int = 0
    semantic_share: float = 0.5
    temperature: float = 1.4
    max_tokens: int = 128
    glossary: bool = True
    licence: str = "Apache-2.0"

    @property
    def dim(self) -> int:
        """Length of an embedding: class-name part, then learned part."""
        return self.text_dim + self.learned_dim

    @property
    def preprocess(self) -> SquarePreprocess:
        """How a picture becomes the trunk's input."""
        return SquarePreprocess(size=self.image_size, mode=self.mode)

    def save(self, folder: Path) -> None:
        """Write `config.json`."""
        (folder / CONFIG).write_text(json.dumps(asdict(self), indent=2) + "\n")


def default_folder() -> Path:
    """The weights that ship with the package."""
    return Path(__file__).resolve().parents[1] / "weights" / "two_tower"


def is_two_tower(folder: Path) -> bool:
    """True if `folder` looks like ours rather than a transformers model."""
    config = folder / CONFIG
    if not (config.is_file() and (folder / WEIGHTS).is_file()):
        return False
    return bool(read_json(config).get("model_type") == MODEL_TYPE)


def read_config(folder: Path) -> TwoTowerConfig:
    """Parse `config.json`; raises `ValueError` if the folder is not a two-tower one."""
    if not is_two_tower(folder):
        raise UserError(
            f"{folder} holds no two-tower encoder: it needs {CONFIG} and {WEIGHTS} from `jobs.train`"
        )
    return make_config(TwoTowerConfig, read_json(folder / CONFIG), folder / CONFIG)


def describe_two_tower(folder: Path | str | None = None) -> EncoderInfo:
    """`EncoderInfo` of a folder (default: the shipped weights), without loading the model.

    The fingerprint is a sha256 over config, weights, language model and preprocessing.
    """
    path = default_folder() if folder is None else Path(folder)
    config = read_config(path)
    digest = hashlib.sha256(repr(config.preprocess).encode())
    for file in [
        path / CONFIG,
        path / WEIGHTS,
        *language_model_files(language_model_folder(config.language_model)),
    ]:
        stat = file.stat()
        digest.update(f"{file.name} {_file_hash(file, stat.st_size, stat.st_mtime_ns)}\n".encode())
    return EncoderInfo(
        name=config.name if folder is None else str(path.resolve()),
        fingerprint=digest.hexdigest(),
        dim=config.dim,
        preprocess=config.preprocess,
        licence=config.licence,
    )


@lru_cache(maxsize=64)
def _file_hash(path: Path, size: int, mtime_ns: int) -> str:
    """sha256 of a file; size and time are in the key so that a changed file is read again."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
