"""diffusers pipelines as translators and generators: small real ones, saved as a user's would be."""

from __future__ import annotations

import importlib.util
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hf_models
import numpy as np
import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file
from test_bulk import picture, rows_of
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer, T5Config, T5EncoderModel
from transformers.utils import logging as transformers_logging

from jobs import generate, translate
from llmvis.config_bulk import GenerateConfig, TranslateConfig
from llmvis.models.load_synthesis import MakeOptions, describe_synthesis, load_synthesis
from llmvis.models.protocols import Generator, Translator
from llmvis.schema import UserError

SIDE = 32
STEPS = 3
UNET = "unet/diffusion_pytorch_model.safetensors"
CHANNELS: dict[str, Any] = {"block_out_channels": (16, 32), "norm_num_groups": 8}
VAE: dict[str, Any] = {
    "down_block_types": ("DownEncoderBlock2D",) * 2,
    "up_block_types": ("UpDecoderBlock2D",) * 2,
}
CARD = "---\nlicense: openrail\n---\n# A pipeline of random weights\n"


def text_tower(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    """A CLIP text tower that tells texts apart, which the usual tiny scale of weights does not."""
    tower = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer), hidden_size=32, intermediate_size=48, num_hidden_layers=2,
            num_attention_heads=4, bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
        )
    )  # fmt: skip
    for parameter in tower.parameters():
        if parameter.ndim >= 2:
            torch.nn.init.normal_(parameter, std=parameter[0].numel() ** -0.5)
    return tower


def save(pipeline: Any, folder: Path) -> Path:
    """As a user would, with a card."""
    bars = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    pipeline.save_pretrained(folder)
    if bars:
        transformers_logging.enable_progress_bar()
    (folder / "README.md").write_text(CARD)
    return folder


def save_pipeline(folder: Path, scheduler: str = "DDIMScheduler") -> Path:
    """Stable Diffusion in small, 16 × 16 latent cells: UNet, VAE, CLIP text tower, real tokenizer, random weights."""
    import diffusers

    tokenizer = hf_models.clip_tokenizer()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        unet = diffusers.UNet2DConditionModel(
            sample_size=16, **CHANNELS, layers_per_block=1, cross_attention_dim=32, attention_head_dim=8,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        )  # fmt: skip
        vae = diffusers.AutoencoderKL(
            **CHANNELS, **VAE,
            scaling_factor=4.0,  # gives latents of unit variance, as a trained one does
        )  # fmt: skip
        with torch.no_grad():  # a trained VAE is sure of what it encodes: the second half are log variances
            vae.quant_conv.weight[4:] = 0
            vae.quant_conv.bias[4:] = -20
        text = text_tower(tokenizer)
    noise: dict[str, Any] = {"clip_sample": False} if scheduler.startswith("DD") else {}
    noise |= {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    whole = diffusers.StableDiffusionPipeline(
        vae=vae, text_encoder=text, tokenizer=tokenizer, unet=unet,
        scheduler=getattr(diffusers, scheduler)(**noise, steps_offset=1),
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip
    return save(whole, folder)


def save_flux(folder: Path) -> Path:
    """FLUX in small: a Transformer that states no size, two text towers, two tokenizers, random weights."""
    import diffusers

    tokenizer, second = hf_models.clip_tokenizer(), hf_models.gemma_tokenizer()
    whole = diffusers.FluxPipeline(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(),
        vae=diffusers.AutoencoderKL(
            **CHANNELS, **VAE, latent_channels=1, shift_factor=0.1, scaling_factor=0.4,
            use_quant_conv=False, use_post_quant_conv=False,
        ),
        text_encoder=text_tower(tokenizer), tokenizer=tokenizer,
        text_encoder_2=T5EncoderModel(
            T5Config(vocab_size=len(second), d_model=32, d_kv=8, d_ff=48, num_layers=1, num_heads=4)
        ),
        tokenizer_2=second,
        transformer=diffusers.FluxTransformer2DModel(
            patch_size=1, in_channels=4, num_layers=1, num_single_layers=1, attention_head_dim=16,
            num_attention_heads=2, joint_attention_dim=32, pooled_projection_dim=32, axes_dims_rope=[4, 4, 8],
        ),
    )  # fmt: skip
    return save(whole, folder)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_pipeline(tmp_path_factory.mktemp("pipelines") / "small")


@pytest.fixture(scope="module")
def generator(folder: Path) -> Generator:
    found: Generator = load_synthesis(str(folder), MakeOptions(steps=STEPS), "generate", threads=1)
    return found


@pytest.fixture(scope="module")
def translator(folder: Path) -> Translator:
    found: Translator = load_synthesis(str(folder), MakeOptions(steps=STEPS), "translate", threads=1)
    return found


@pytest.fixture
def copy(folder: Path, tmp_path: Path) -> Path:
    """A pipeline to be spoilt."""
    return Path(shutil.copytree(folder, tmp_path / "copy"))


def make(
    generator: Generator,
    prompt: str = "a red flower",
    seed: int = 1,
    key: str = "a",
    negative: str | None = None,
) -> np.ndarray:
    """One picture, alone: uint8 (H, W, 3)."""
    return generator.generate([prompt], negatives=[negative], seeds=[seed], ids=[key])[0]


def sources(count: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (count, SIDE, SIDE, 3), np.uint8)


def edit(file: Path, **changes: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def fingerprint(folder: Path, task: str = "generate", **options: Any) -> str:
    return describe_synthesis(str(folder), MakeOptions(**options), task).fingerprint


def test_a_description_comes_from_files_alone_without_torch(folder: Path) -> None:
    code = (
        "import sys\nfrom llmvis.models.load_synthesis import *\n"
        f"i = describe_synthesis({str(folder)!r}, MakeOptions(), 'generate')\n"
        "print(i.name, i.side, i.licence, *({'torch', 'diffusers', 'transformers'} & set(sys.modules)), sep='|')"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == f"{folder.resolve()}|{SIDE}|openrail"


def test_a_prompt_gives_the_same_bytes_alone_and_in_a_batch(generator: Generator) -> None:
    asked: dict[str, Any] = {
        "prompts": ["a red flower", "eine rote Blume " * 60, "花园里的一朵红花 \ud800", ""],
        "negatives": [None, "garden", "", None],
    }
    made = generator.generate(**asked, seeds=[1, 2, 3, 4], ids=list("abcd"))
    assert made.dtype == np.uint8 and made.shape == (4, SIDE, SIDE, 3)
    assert all(len(np.unique(picture)) > 20 for picture in made)
    for i in range(4):
        alone = make(generator, asked["prompts"][i], i + 1, "abcd"[i], asked["negatives"][i])
        np.testing.assert_array_equal(alone, made[i])
    assert generator.generate([], negatives=[], seeds=[], ids=[]).shape == (0, SIDE, SIDE, 3)


@pytest.mark.parametrize(
    "other", [{"seed": 2}, {"key": "b"}, {"prompt": "the forest"}, {"negative": "the forest"}], ids=str
)
def test_another_request_gives_another_picture(generator: Generator, other: dict[str, Any]) -> None:
    assert (make(generator) != make(generator, **other)).any()


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # diffusers and NumPy 2
@pytest.mark.parametrize("scheduler", ["EulerAncestralDiscreteScheduler", "DDPMScheduler"])
def test_schedulers_that_draw_noise_at_each_step_draw_it_from_the_rows_own_stream(
    tmp_path: Path, scheduler: str
) -> None:
    saved = save_pipeline(tmp_path / "saved", scheduler)
    generator = load_synthesis(str(saved), MakeOptions(steps=STEPS), "generate", threads=1)
    made = generator.generate(["a red flower"] * 2, negatives=[None] * 2, seeds=[0, 1], ids=["a", "a"])
    np.testing.assert_array_equal(make(generator), made[1])


def test_a_translation_is_the_same_alone_and_in_a_batch_and_begins_from_its_source(
    translator: Translator,
) -> None:
    pictures = sources(3)
    pictures.flags.writeable = False  # as Ray hands them over
    words: dict[str, Any] = {"instructions": ["a red flower", "the garden", ""], "seeds": [5, 6, 7]}
    made = translator.translate(pictures, **words, ids=list("abc"))
    assert made.dtype == np.uint8 and made.shape == (3, SIDE, SIDE, 3)
    for i in range(3):
        alone = translator.translate(
            pictures[i : i + 1], words["instructions"][i : i + 1], seeds=[5 + i], ids=["abc"[i]]
        )
        np.testing.assert_array_equal(alone[0], made[i])
    others = translator.translate(255 - pictures, **words, ids=list("abc"))
    assert all((mine != other).any() for mine, other in zip(made, others, strict=True))


def test_less_strength_stays_nearer_to_the_source_whatever_the_seed(folder: Path) -> None:
    def spread(strength: float) -> float:
        """How far pictures of different seeds lie apart."""
        options = MakeOptions(steps=50, strength=strength)
        model = load_synthesis(str(folder), options, "translate", threads=1)
        made = model.translate(
            np.repeat(sources(1), 2, 0), ["a red flower"] * 2, seeds=[1, 2], ids=["a", "a"]
        )
        return float(np.abs(made[0].astype(float) - made[1]).mean())

    assert spread(0.02) < 0.5 * spread(1.0)


def test_a_mask_is_filled_in_and_the_rest_is_the_source_through_the_vae(translator: Translator) -> None:
    mask = np.zeros((2, SIDE, SIDE), bool)
    mask[:, :, : SIDE // 2] = True
    asked: dict[str, Any] = {"instructions": ["a red flower"] * 2, "seeds": [1, 2], "ids": ["a", "a"]}
    made = translator.translate(np.repeat(sources(1), 2, 0), **asked, masks=mask)
    assert made.dtype == np.uint8 and made.shape == (2, SIDE, SIDE, 3)
    apart = np.abs(made[0].astype(float) - made[1]).mean((0, 2))  # by column
    assert apart[: SIDE // 4].mean() > 3 * apart[-SIDE // 4 :].mean()
    alone = translator.translate(sources(1), ["a red flower"], seeds=[2], ids=["a"], masks=mask[:1])
    np.testing.assert_array_equal(alone[0], made[1])


def test_rows_that_run_together_as_on_a_gpu_give_what_they_give_alone(folder: Path) -> None:
    generator = load_synthesis(str(folder), MakeOptions(steps=STEPS), "generate", threads=1)
    asked: dict[str, Any] = {"negatives": [None, "garden", None], "seeds": [1, 2, 3], "ids": list("abc")}
    prompts = ["a red flower", "the garden", "a flower"]
    alone = generator.generate(prompts, **asked)
    generator.device = torch.device(
        "cuda"
    )  # batches are put together for one; the pipeline stays where it is
    together = generator.generate(prompts, **asked)
    assert np.abs(alone.astype(int) - together).max() <= 1


def test_a_transformer_that_states_no_size_works_at_the_one_that_diffusers_takes(tmp_path: Path) -> None:
    saved = str(save_flux(tmp_path / "flux"))
    generator = load_synthesis(saved, MakeOptions(steps=1), "generate", threads=1)
    assert generator.info.side == 256  # 128 latent cells of 2 × 2
    assert make(generator).shape == (256, 256, 3)
    translator = load_synthesis(saved, MakeOptions(steps=2), "translate", threads=1)
    source = np.repeat(np.repeat(sources(1), 8, 1), 8, 2)
    asked: dict[str, Any] = {"instructions": ["a red flower"], "seeds": [1], "ids": ["a"]}
    assert translator.translate(source, **asked).shape == (1, 256, 256, 3)
    assert translator.translate(source, **asked, masks=np.ones((1, 256, 256), bool)).shape == (1, 256, 256, 3)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_cuda_gives_nearly_what_the_cpu_gives(folder: Path, generator: Generator) -> None:
    fast = load_synthesis(str(folder), MakeOptions(steps=STEPS), "generate", device="cuda")
    assert np.abs(make(generator).astype(int) - make(fast)).mean() < 3


def test_weights_in_shards_make_the_same_pictures(copy: Path, generator: Generator) -> None:
    from diffusers import UNet2DConditionModel

    unet = UNet2DConditionModel.from_pretrained(copy / "unet", low_cpu_mem_usage=False)
    (copy / UNET).unlink()
    unet.save_pretrained(copy / "unet", max_shard_size="1MB")
    shards = sorted((copy / "unet").glob("*-of-*.safetensors"))
    assert len(shards) > 1 and not (copy / UNET).exists()
    sharded = load_synthesis(str(copy), MakeOptions(steps=STEPS), "generate", threads=1)
    np.testing.assert_array_equal(make(sharded), make(generator))
    shards[1].unlink()
    with pytest.raises(UserError, match=f"lacks {shards[1].name}"):
        fingerprint(copy)
    edit(copy / f"{UNET}.index.json", weight_map={"conv_in.weight": "../weights.bin"})
    with pytest.raises(UserError, match=r"names '\.\./weights\.bin'"):
        fingerprint(copy)


def test_the_fingerprint_tells_apart_what_makes_other_pictures_and_nothing_else(
    copy: Path, folder: Path
) -> None:
    same = fingerprint(copy)
    assert same == fingerprint(folder)
    others = [fingerprint(copy, **options) for options in ({"steps": 2}, {"steps": 3}, {"guidance": 2.0})]
    others.append(fingerprint(copy, "translate"))
    (copy / "unet" / "diffusion_pytorch_model.fp16.safetensors").write_bytes(b"never read")
    (copy / "unet" / "diffusion_pytorch_model.bin").write_bytes(b"never read")
    assert fingerprint(copy) == same
    for name in (UNET, "vae/diffusion_pytorch_model.safetensors", "text_encoder/model.safetensors",
                 "scheduler/scheduler_config.json", "tokenizer/tokenizer.json"):  # fmt: skip
        data = bytearray((copy / name).read_bytes())
        data[-2] ^= 1
        (copy / name).write_bytes(data)
        others.append(fingerprint(copy))
    assert len({same, *others}) == 1 + len(others)


def pickled(copy: Path) -> None:
    torch.save(load_file(copy / UNET), (copy / UNET).with_suffix(".bin"))
    (copy / UNET).unlink()


def only_half_precision(copy: Path) -> None:
    (copy / UNET).rename(copy / UNET.replace(".safetensors", ".fp16.safetensors"))


def own_program(copy: Path) -> None:
    (copy / "unet" / "my_unet.py").write_text("raise SystemExit('was run')")


def own_class(copy: Path) -> None:
    edit(copy / "model_index.json", _class_name=["pipeline", "MyPipeline"])


def foreign_library(copy: Path) -> None:
    edit(copy / "model_index.json", unet=["my_unet", "MyUNet"])


def without_a_part(copy: Path) -> None:
    shutil.rmtree(copy / "scheduler")


def for_inpainting_only(copy: Path) -> None:
    edit(copy / "unet" / "config.json", in_channels=9)


def without_a_vae(copy: Path) -> None:
    edit(copy / "model_index.json", vae=[None, None])


def without_a_size(copy: Path) -> None:
    edit(copy / "unet" / "config.json", sample_size=None)


def broken_index(copy: Path) -> None:
    (copy / "model_index.json").write_text("{")


def no_pipeline(copy: Path) -> None:
    (copy / "model_index.json").unlink()


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (pickled, "pickle, which can run code.*save_pretrained"),
        (only_half_precision, "weights of a variant"),
        (own_program, r"program code of its own \(my_unet.py\)"),
        (own_class, r"program code of its own \(see model_index.json\)"),
        (foreign_library, "unet from 'my_unet'.*runs no other code"),
        (without_a_part, "lacks the folder scheduler"),
        (for_inpainting_only, "takes 9 channels where its vae gives 4"),
        (without_a_vae, "with a vae and a unet or transformer"),
        (without_a_size, "states no sample_size"),
        (broken_index, "model_index.json is not JSON"),
        (no_pipeline, "neither language/config.json.*nor model_index.json"),
    ],
)
def test_a_folder_that_cannot_be_used_is_refused_before_anything_is_loaded(
    copy: Path, spoil: Callable[[Path], None], words: str
) -> None:
    spoil(copy)
    with pytest.raises(UserError, match=words):
        fingerprint(copy)


def half_of_the_file(copy: Path) -> None:
    (copy / UNET).write_bytes((copy / UNET).read_bytes()[:100_000])


def half_of_the_weights(copy: Path) -> None:
    weights = load_file(copy / UNET)
    save_file({name: weights[name] for name in sorted(weights)[::2]}, copy / UNET, {"format": "pt"})


def tokenizer_cut_off(copy: Path) -> None:
    file = copy / "tokenizer" / "tokenizer.json"
    file.write_text(file.read_text()[:1000])


def unheard_of(copy: Path) -> None:
    edit(copy / "model_index.json", unet=["diffusers", "UNetOfTomorrow"])


def of_another_task(copy: Path) -> None:
    edit(copy / "model_index.json", _class_name="StableVideoDiffusionPipeline")


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (half_of_the_file, "can't be loaded by .*diffusers 0"),
        (half_of_the_weights, r"lack \d+ of the weights of UNet2DConditionModel, such as "),
        (tokenizer_cut_off, "can't be loaded by"),
        (unheard_of, "UNetOfTomorrow"),
        (of_another_task, "can't find a pipeline linked to StableVideoDiffusionPipeline"),
    ],
)
def test_a_pipeline_that_is_not_whole_or_not_of_the_task_is_refused_when_loaded(
    copy: Path, spoil: Callable[[Path], None], words: str
) -> None:
    spoil(copy)
    with pytest.raises(UserError, match=words):
        load_synthesis(str(copy), MakeOptions(), "generate")


def test_weights_that_give_nan_are_an_error_and_no_black_picture(copy: Path) -> None:
    weights = load_file(copy / UNET)
    save_file(
        {name: torch.full_like(t, torch.nan) for name, t in weights.items()}, copy / UNET, {"format": "pt"}
    )
    broken = load_synthesis(str(copy), MakeOptions(steps=STEPS), "generate", threads=1)
    with pytest.raises(RuntimeError, match=r"NaN.*'a red flower'"):
        make(broken)


@pytest.mark.parametrize(
    ("task", "options", "words"),
    [
        ("generate", {"temperature": 1.0}, "--temperature is not of diffusers pipelines"),
        ("generate", {"reference": 0.5}, "--reference is not of diffusers pipelines"),
        ("generate", {"strength": 0.5}, "--strength .* no source"),
        ("translate", {"steps": 3, "strength": 0.3}, "--steps 3 at a strength of 0.3 leaves no step"),
    ],
)
def test_options_of_other_models_are_refused_at_once(
    folder: Path, task: str, options: dict[str, Any], words: str
) -> None:
    with pytest.raises(UserError, match=words):
        describe_synthesis(str(folder), MakeOptions(**options), task)


def test_too_few_steps_for_the_pipelines_own_strength_are_refused_when_loaded(folder: Path) -> None:
    with pytest.raises(UserError, match=r"--steps 1 at a strength of 0.8 leaves no step"):
        load_synthesis(str(folder), MakeOptions(steps=1), "translate")


def test_without_the_package_the_message_names_the_extra(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *more: None if name == "diffusers" else found(name, *more)
    )
    for name in (str(folder), "someone/pipeline"):
        with pytest.raises(UserError, match=re.escape("pip install 'llmvis[diffusers]'")):
            describe_synthesis(name, MakeOptions(), "generate")


@pytest.mark.parametrize(
    ("name", "words"),
    [("someone/pipeline", "hf download someone/pipeline"), ("./no/where/at/all", "no folder")],
)
def test_a_name_that_is_nowhere_is_refused_with_what_to_do(name: str, words: str) -> None:
    with pytest.raises(UserError, match=words):
        describe_synthesis(name, MakeOptions(), "generate")


def test_whole_jobs_run_a_pipeline_by_its_folder(
    tmp_path: Path, ray_cluster: None, folder: Path, generator: Generator
) -> None:
    (tmp_path / "prompts.txt").write_text("a red flower\nthe garden\n")
    generate.run(
        GenerateConfig(
            prompts=str(tmp_path / "prompts.txt"), out=str(tmp_path / "made"), model=str(folder), variants=2,
            steps=STEPS,
        )
    )  # fmt: skip
    made = rows_of(tmp_path / "made")
    assert len(made) == 4 and {row["model"] for row in made} == {str(folder.resolve())}
    assert {row["model_fingerprint"] for row in made} == {generator.info.fingerprint}
    for row in made:
        alone = make(generator, row["prompt"], row["seed"], row["prompt"])
        np.testing.assert_array_equal(np.asarray(picture(row)), alone)
    tiny.pictures(tmp_path / "in", 3)
    translate.run(
        TranslateConfig(
            images=str(tmp_path / "in"), out=str(tmp_path / "again"), model=str(folder), strength=0.5,
            steps=STEPS, instruction=("a red flower",),
        )
    )  # fmt: skip
    assert [picture(row).size for row in rows_of(tmp_path / "again")] == [(SIDE, SIDE)] * 3
