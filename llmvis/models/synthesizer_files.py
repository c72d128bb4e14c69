"""A synthesis model's folder: `tokenizer/`, `language/` and, where it was trained, `branch/`.

`language/` holds what training changed; the words' own embeddings stay with the language
model that it began from, which is named in its config.
"""

from __future__ import annotations

import json
import logging
from dataclasses import asdict
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoModel, AutoTokenizer
from transformers.utils.logging import disable_progress_bar

from llmvis.models.files import fit_tensors, make_config, open_pretrained, read_json, read_tensors
from llmvis.models.language import LanguageConfig, LanguageModel
from llmvis.models.language_model import language_model_folder
from llmvis.models.load_synthesis import fingerprint_of
from llmvis.models.source_branch import SourceBranch
from llmvis.models.synthesizer import Synthesizer, Words
from llmvis.models.tokenizer import ImageTokenizer, Quantiser
from llmvis.models.tokenizer_files import encoder_digest, load_tokenizer
from llmvis.schema import UserError

MODEL_TYPE = "llmvis-language"
CONFIG, WEIGHTS = "config.json", "model.safetensors"


def default_synthesizer() -> Path:
    """The weights that ship with the package."""
    return Path(__file__).resolve().parents[1] / "weights" / "synthesis"


def load_synthesizer(folder: Path | str | None = None, device: str = "cpu") -> Synthesizer:
    """The model of a folder (default: the shipped weights); raises `UserError` where there is none."""
    path = default_synthesizer() if folder is None else Path(folder)
    tokenizer = load_tokenizer(path / "tokenizer")
    config = _read_config(path / "language")
    if (config.grid, config.groups, config.levels) != (
        tokenizer.config.grid,
        tokenizer.config.groups,
        tokenizer.config.levels,
    ):
        raise UserError(f"{path}: language/ was trained for other code words than those of tokenizer/")
    if made_for(path / "language") not in (None, encoder_digest(tokenizer)):
        raise UserError(f"{path}: language/ was trained for another tokenizer/: train --stage language again")
    language, words = new_language(config, tokenizer)
    _load_trained(language, read_tensors(path / "language" / WEIGHTS), path)
    branch = None
    if (path / "branch" / WEIGHTS).is_file():
        branch = SourceBranch(tokenizer.config, language.width)
        file = path / "branch" / WEIGHTS
        fit_tensors(branch, read_tensors(file), file)
    return Synthesizer(tokenizer, language, words, branch, fingerprint_of(path), device)


def new_language(config: LanguageConfig, tokenizer: ImageTokenizer) -> tuple[LanguageModel, Words]:
    """An untrained `LanguageModel` on a pre-trained transformer, and its reader of words."""
    folder = language_model_folder(config.language_model)
    disable_progress_bar()  # type: ignore[no-untyped-call]  # of reading local files, a second's work
    level = logging.getLogger("transformers").level
    logging.getLogger("transformers").setLevel(logging.ERROR)  # it warns of heads that we leave out
    try:
        transformer: Any = open_pretrained(AutoModel, folder, use_safetensors=True)
    finally:
        logging.getLogger("transformers").setLevel(level)
    if getattr(transformer, "pooler", None) is not None:
        transformer.pooler = None  # of the whole sequence: not asked for
    words = Words(open_pretrained(AutoTokenizer, folder), config.words)
    quantiser = Quantiser(config.groups, config.levels)
    return LanguageModel(config, transformer, quantiser.entries, words.tokenizer.mask_token_id), words


def save_language(model: LanguageModel, folder: Path, tokenizer: ImageTokenizer) -> None:
    """Config, whose code words it knows, and what training changed, as fp16."""
    folder.mkdir(parents=True, exist_ok=True)
    config = {"model_type": MODEL_TYPE, **asdict(model.config), "encoder": encoder_digest(tokenizer)}
    (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n")
    save_file({name: t.half().cpu().contiguous() for name, t in _trained(model).items()}, folder / WEIGHTS)


def made_for(folder: Path) -> str | None:
    """Digest of the encoder whose code words the language model of a folder knows; None where it is not told."""
    digest = read_json(folder / CONFIG).get("encoder")
    return None if digest is None else str(digest)


def save_branch(branch: SourceBranch, folder: Path) -> None:
    """Weights as fp16; its sizes are the tokeniser's."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file(
        {name: t.half().cpu().contiguous() for name, t in branch.state_dict().items()}, folder / WEIGHTS
    )


def _trained(model: LanguageModel) -> dict[str, Tensor]:
    """State without the words' embeddings, which appear under two names."""
    table = model.word_table.weight
    return {name: t.detach() for name, t in model.state_dict(keep_vars=True).items() if t is not table}


def _load_trained(model: LanguageModel, tensors: dict[str, Tensor], path: Path) -> None:
    wanted = _trained(model)
    if tensors.keys() != wanted.keys():
        odd = sorted(tensors.keys() ^ wanted.keys())[:3]
        raise UserError(f"{path / 'language'} does not fit {model.config.language_model}: {', '.join(odd)} …")
    fit_tensors(model, tensors, path / "language" / WEIGHTS, strict=False)


def _read_config(folder: Path) -> LanguageConfig:
    told = read_json(folder / CONFIG, "language model of ours")
    if told.pop("model_type", None) != MODEL_TYPE:
        raise UserError(
            f"{folder / CONFIG} is not of a language model of ours: train one with --stage language"
        )
    told.pop("encoder", None)  # see `made_for`
    return make_config(LanguageConfig, told, folder / CONFIG)
