"""The toy world: every frozen model that the library loads, in small, in its own folder.

The classes and the ``save_pretrained`` format are those of the real repositories and are opened by
the same code; only the sizes differ. ``tinyflux/toy/world`` holds one that
:mod:`tinyflux.toy.train_world` trained; tests build untrained ones in a second.
"""

import dataclasses
import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)

from tinyflux.errors import InputError

SHIPPED = Path(__file__).parent / "world"


@dataclasses.dataclass(frozen=True)
class WorldSizes:
    """Sizes of a toy world; the defaults are those of the one that ships.

    Attributes:
        picture_size: side in pixels of the pictures it is meant for.
        vae_channels: channels per resolution; each further one halves the side.
        latent_channels: channels of the student's latents.
        sd_latent_channels: channels of a VAE of the teachers' own, stored in ``sd/vae``; None
            means that teachers work on the student's latents.
        text_width, text_layers: of both text encoders.
        teacher_channels: channels per resolution of both teachers.
        vocabulary: tokens of each tokenizer, at most.
    """

    picture_size: int = 32
    vae_channels: tuple[int, ...] = (32, 48, 64)
    latent_channels: int = 16
    sd_latent_channels: int | None = None
    text_width: int = 128
    text_layers: int = 3
    teacher_channels: tuple[int, ...] = (64, 128)
    vocabulary: int = 1000
    clip_positions: int = 32


def unpack(folder: str | Path) -> Path:
    """Copy the shipped, trained world to ``folder``; a whole copy already there is kept."""
    folder = Path(folder)
    if not (folder / "world.json").exists():
        partial = folder.with_name(folder.name + ".partial")
        shutil.rmtree(partial, ignore_errors=True)
        shutil.copytree(SHIPPED, partial)
        shutil.rmtree(folder, ignore_errors=True)
        partial.rename(folder)
    return folder


def build_untrained(
    folder: str | Path, captions: Sequence[str], seed: int, sizes: WorldSizes | None = None
) -> Path:
    """Write a world with random weights and tokenizers made from ``captions`` to ``folder``."""
    folder, sizes = Path(folder), sizes or WorldSizes()
    t5_vocabulary, clip_vocabulary = build_tokenizers(captions, folder, sizes)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        _vae(sizes, sizes.latent_channels).save_pretrained(folder / "vae")
        if sizes.sd_latent_channels is not None:
            _vae(sizes, sizes.sd_latent_channels).save_pretrained(folder / "sd" / "vae")
        _t5(sizes, t5_vocabulary).save_pretrained(folder / "t5")
        _clip(sizes, clip_vocabulary).save_pretrained(folder / "clip")
        for teacher in ("lune", "sol"):
            _teacher(sizes).save_pretrained(folder / teacher)
    return folder


def build_tokenizers(captions: Sequence[str], folder: Path, sizes: WorldSizes) -> tuple[int, int]:
    """Train a T5 and a CLIP tokenizer on ``captions``, save them to ``t5/`` and ``clip/``.

    Returns:
        Their vocabulary sizes.
    """
    if not captions:
        raise InputError("a toy world needs at least one caption to make its tokenizers from")
    t5, clip = _t5_tokenizer(captions, sizes), _clip_tokenizer(captions, sizes)
    t5.save_pretrained(folder / "t5")
    clip.save_pretrained(folder / "clip")
    return len(t5), len(clip)


def _t5_tokenizer(captions: Sequence[str], sizes: WorldSizes) -> T5Tokenizer:
    unigram = Tokenizer(models.Unigram())
    unigram.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.WhitespaceSplit(),
            pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="always", split=True),
        ]
    )
    unigram.train_from_iterator(
        captions,
        trainers.UnigramTrainer(
            vocab_size=sizes.vocabulary,
            special_tokens=["<pad>", "</s>", "<unk>"],
            unk_token="<unk>",
            show_progress=False,
        ),
    )
    pieces = [tuple(piece) for piece in json.loads(unigram.to_str())["model"]["vocab"]]
    return T5Tokenizer(vocab=pieces, extra_ids=0, model_max_length=512)


def _clip_tokenizer(captions: Sequence[str], sizes: WorldSizes) -> CLIPTokenizer:
    bpe = Tokenizer(models.BPE(unk_token="<|endoftext|>", end_of_word_suffix="</w>"))
    bpe.normalizer = normalizers.Lowercase()
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.WhitespaceSplit(),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    bpe.train_from_iterator(
        captions,
        trainers.BpeTrainer(
            vocab_size=max(sizes.vocabulary, 2 * len(alphabet) + 2),
            special_tokens=["<|startoftext|>", "<|endoftext|>"],
            end_of_word_suffix="</w>",
            initial_alphabet=alphabet,
            show_progress=False,
        ),
    )
    learned = json.loads(bpe.to_str())["model"]
    return CLIPTokenizer(
        vocab=learned["vocab"],
        merges=[tuple(merge) for merge in learned["merges"]],  # type: ignore[misc]  # as BPE has them
        model_max_length=sizes.clip_positions,
    )


def _t5(sizes: WorldSizes, vocabulary: int) -> T5EncoderModel:
    return T5EncoderModel(
        T5Config(
            vocab_size=vocabulary,
            d_model=sizes.text_width,
            d_kv=sizes.text_width // 4,
            d_ff=2 * sizes.text_width,
            num_layers=sizes.text_layers,
            num_heads=4,
            feed_forward_proj="gated-gelu",  # as in flan-T5
        )
    )


def _clip(sizes: WorldSizes, vocabulary: int) -> CLIPTextModel:
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=vocabulary,
            hidden_size=sizes.text_width,
            intermediate_size=2 * sizes.text_width,
            projection_dim=sizes.text_width,
            num_hidden_layers=sizes.text_layers,
            num_attention_heads=4,
            max_position_embeddings=sizes.clip_positions,
            # Where the pooled embedding is read; the config's own default is CLIP's.
            bos_token_id=0,
            eos_token_id=1,
            pad_token_id=1,
        )
    )


def _teacher(sizes: WorldSizes) -> UNet2DConditionModel:
    levels = len(sizes.teacher_channels)
    latent_channels = sizes.sd_latent_channels or sizes.latent_channels
    return UNet2DConditionModel(
        sample_size=sizes.picture_size // 2 ** (len(sizes.vae_channels) - 1),
        in_channels=latent_channels,
        out_channels=latent_channels,
        block_out_channels=sizes.teacher_channels,
        down_block_types=("CrossAttnDownBlock2D",) * (levels - 1) + ("DownBlock2D",),
        up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * (levels - 1),
        layers_per_block=1,
        cross_attention_dim=sizes.text_width,
        attention_head_dim=4,  # diffusers' name for the number of heads
        norm_num_groups=8,
    )


def _vae(sizes: WorldSizes, latent_channels: int) -> AutoencoderKL:
    levels = len(sizes.vae_channels)
    return AutoencoderKL(
        block_out_channels=sizes.vae_channels,
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        layers_per_block=1,
        latent_channels=latent_channels,
        norm_num_groups=8,
        sample_size=sizes.picture_size,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )
