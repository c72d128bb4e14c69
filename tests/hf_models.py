"""Small real Hugging Face checkpoints: genuine model classes, tokenizers and processors, random weights.

Each function saves one to a folder with save_pretrained, as a user would. The tokenizers
are trained here on a few sentences in six languages.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import (
    AltCLIPConfig,
    AltCLIPModel,
    AltCLIPProcessor,
    BertTokenizer,
    ChineseCLIPConfig,
    ChineseCLIPModel,
    ChineseCLIPProcessor,
    CLIPConfig,
    CLIPModel,
    CLIPProcessor,
    CLIPTokenizer,
    GemmaTokenizer,
    Siglip2Config,
    Siglip2Model,
    Siglip2Processor,
    SiglipConfig,
    SiglipModel,
    SiglipProcessor,
    XLMRobertaTokenizer,
)
from transformers.models.chinese_clip.image_processing_pil_chinese_clip import ChineseCLIPImageProcessorPil
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil
from transformers.models.siglip2.image_processing_pil_siglip2 import Siglip2ImageProcessorPil
from transformers.utils import logging as transformers_logging

TEXTS = {
    "en": "a red flower in the garden",
    "de": "eine rote Blume im schönen Garten",
    "fr": "une fleur rouge à côté de la forêt",
    "es": "una flor roja en el jardín del niño",
    "zh": "花园里的一朵红花",
    "ja": "庭に咲いている赤い花",
}
_TOWER = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
_VISION = _TOWER | {"image_size": 32, "patch_size": 8}


def _corpus() -> list[str]:
    return [t for t in TEXTS.values() for _ in range(20)]


def _special(*names: str) -> dict[str, int]:
    return {name: i for i, name in enumerate(names)}


def clip_tokenizer() -> CLIPTokenizer:
    """Byte-level BPE with CLIP's end-of-word mark, 77 tokens."""
    bpe = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    bpe.normalizer = normalizers.Lowercase()
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=340,
        end_of_word_suffix="</w>",
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(_corpus(), trainer)
    vocab = bpe.get_vocab(with_added_tokens=False)
    for letter in pre_tokenizers.ByteLevel.alphabet():
        vocab.setdefault(letter + "</w>", len(vocab))
    for name in ("<|startoftext|>", "<|endoftext|>"):
        vocab[name] = len(vocab)
    merges = [tuple(m) for m in json.loads(bpe.to_str())["model"]["merges"]]
    return CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=77)


def gemma_tokenizer() -> GemmaTokenizer:
    """BPE with byte fallback, as of SigLIP 2: no mask, padded on the right, multilingual."""
    special = ("<pad>", "<eos>", "<bos>", "<unk>", "<mask>", *(f"<0x{i:02X}>" for i in range(256)))
    bpe = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
    bpe.normalizer = normalizers.Sequence([normalizers.Lowercase(), normalizers.Replace(" ", "▁")])
    bpe.decoder = decoders.ByteFallback()
    trainer = trainers.BpeTrainer(vocab_size=330, special_tokens=list(special), show_progress=False)
    bpe.train_from_iterator(_corpus(), trainer)
    saved = json.loads(bpe.to_str())["model"]
    return GemmaTokenizer(
        vocab=saved["vocab"],
        merges=[tuple(m) for m in saved["merges"]],
        model_input_names=["input_ids"],
        padding_side="right",
        model_max_length=64,
    )


def xlmr_tokenizer() -> XLMRobertaTokenizer:
    """Unigram over six languages, as of AltCLIP and MetaCLIP 2."""
    special = ["<s>", "<pad>", "</s>", "<unk>"]
    unigram = Tokenizer(models.Unigram())
    unigram.pre_tokenizer = pre_tokenizers.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=160, special_tokens=special, unk_token="<unk>", show_progress=False
    )
    unigram.train_from_iterator(_corpus(), trainer)
    vocab = json.loads(unigram.to_str())["model"]["vocab"]
    pieces = [(p, s) for p, s in vocab]
    return XLMRobertaTokenizer(vocab=[*pieces, ("<mask>", 0.0)], model_max_length=512)


def bert_tokenizer() -> BertTokenizer:
    """WordPiece of single characters, as of Chinese-CLIP."""
    letters = sorted({c for t in TEXTS.values() for c in t.lower() if c != " "})
    vocab = _special("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters, *(f"##{c}" for c in letters))
    return BertTokenizer(vocab=vocab, model_max_length=52)


def save_clip(folder: Path, seed: int = 0) -> Path:
    """CLIP: D = 24, pictures 32 x 32 by shortest edge and centre crop."""
    tokenizer = clip_tokenizer()
    text = _TOWER | {
        "vocab_size": len(tokenizer),
        "eos_token_id": tokenizer.eos_token_id,
        "bos_token_id": tokenizer.bos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    config = CLIPConfig(text_config=text, vision_config=_VISION, projection_dim=24)
    images = CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    return _save(folder, CLIPModel, config, CLIPProcessor(images, tokenizer), seed)


def save_siglip(folder: Path, seed: int = 0) -> Path:
    """SigLIP with the multilingual tokenizer of SigLIP 2: D = 32, pictures squashed to 32 x 32."""
    tokenizer = gemma_tokenizer()
    text = _TOWER | {
        "vocab_size": len(tokenizer),
        "max_position_embeddings": 64,
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
    }
    config = SiglipConfig(text_config=text, vision_config=_VISION)
    images = SiglipImageProcessorPil(size={"height": 32, "width": 32})
    return _save(folder, SiglipModel, config, SiglipProcessor(images, tokenizer), seed)


def save_altclip(folder: Path, seed: int = 0) -> Path:
    """AltCLIP: an XLM-R text tower for many languages; D = 24; positions start at 2."""
    tokenizer = xlmr_tokenizer()
    text = _TOWER | {
        "vocab_size": len(tokenizer),
        "max_position_embeddings": 66,
        "type_vocab_size": 1,
        "project_dim": 28,
        "pad_token_id": tokenizer.pad_token_id,
    }
    config = AltCLIPConfig(text_config=text, vision_config=_VISION, projection_dim=24)
    images = CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    return _save(folder, AltCLIPModel, config, AltCLIPProcessor(images, tokenizer), seed)


def save_chinese_clip(folder: Path, seed: int = 0) -> Path:
    """Chinese-CLIP: a BERT text tower; D = 24; another mean and standard deviation."""
    tokenizer = bert_tokenizer()
    text = _TOWER | {"vocab_size": len(tokenizer), "max_position_embeddings": 52}
    config = ChineseCLIPConfig(text_config=text, vision_config=_VISION, projection_dim=24)
    images = ChineseCLIPImageProcessorPil(
        size={"height": 32, "width": 32}, do_center_crop=False, image_mean=[0.4, 0.5, 0.6]
    )
    return _save(folder, ChineseCLIPModel, config, ChineseCLIPProcessor(images, tokenizer), seed)


def save_naflex(folder: Path) -> Path:
    """SigLIP 2 NaFlex, whose processor gives patches: to be refused."""
    tokenizer = gemma_tokenizer()
    text = _TOWER | {"vocab_size": len(tokenizer), "max_position_embeddings": 64}
    config = Siglip2Config(text_config=text, vision_config=_TOWER | {"num_patches": 16, "patch_size": 8})
    images = Siglip2ImageProcessorPil(patch_size=8, max_num_patches=16)
    return _save(folder, Siglip2Model, config, Siglip2Processor(images, tokenizer), 0)


FAMILIES: dict[str, Callable[[Path], Path]] = {
    "clip": save_clip,
    "siglip": save_siglip,
    "altclip": save_altclip,
    "chinese_clip": save_chinese_clip,
}
MULTILINGUAL = ("siglip", "altclip")


def _save(folder: Path, model_class: Any, config: Any, processor: Any, seed: int) -> Path:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = model_class(config)
        for name, parameter in model.named_parameters():  # the usual tiny scale makes all texts alike
            if parameter.ndim >= 2 and "position" not in name:
                torch.nn.init.normal_(parameter, std=parameter[0].numel() ** -0.5)
    bars = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    model.save_pretrained(folder)
    if bars:
        transformers_logging.enable_progress_bar()
    processor.save_pretrained(folder)
    return folder
