"""Tiny base models of every family, with random weights and real tokenizers."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DDPMPipeline,
    DDPMScheduler,
    DiTPipeline,
    DiTTransformer2DModel,
    EDMEulerScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    PixArtAlphaPipeline,
    PixArtSigmaPipeline,
    PixArtTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
    UNet2DModel,
)
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)

LETTERS = "abcdefghijklmnopqrstuvwxyz0123456789"
WIDTH = 8


def clip_tokenizer() -> CLIPTokenizer:
    """Letters, and one pair of them, as CLIP's byte-pair encoding has them."""
    words = [*LETTERS, *(f"{letter}</w>" for letter in LETTERS), "at</w>"]
    words += ["<|startoftext|>", "<|endoftext|>"]
    vocab = {word: number for number, word in enumerate(words)}
    return CLIPTokenizer(vocab=vocab, merges=[("a", "t</w>")], model_max_length=20)


def t5_tokenizer() -> T5Tokenizer:
    """Letters as SentencePiece's unigrams."""
    words = ["<pad>", "</s>", "<unk>", "▁", *LETTERS, *(f"▁{letter}" for letter in LETTERS)]
    return T5Tokenizer(vocab=[(word, -1.0) for word in words], extra_ids=0)


def clip(kind: type, width: int = WIDTH) -> Any:
    tokenizer = clip_tokenizer()
    return kind(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=width,
            intermediate_size=16,
            projection_dim=width,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=20,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    ).eval()


def t5(width: int) -> T5EncoderModel:
    config = T5Config(
        vocab_size=len(t5_tokenizer()), d_model=width, d_kv=4, d_ff=16, num_layers=1, num_heads=2
    )
    return T5EncoderModel(config).eval()


def vae(latent_channels: int = 4, **config: Any) -> AutoencoderKL:
    return AutoencoderKL(
        in_channels=3,
        out_channels=3,
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=latent_channels,
        norm_num_groups=4,
        **config,
    ).eval()


def unet(cross_attention_dim: int, **config: Any) -> UNet2DConditionModel:
    return UNet2DConditionModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        layers_per_block=1,
        block_out_channels=(8, 16),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=cross_attention_dim,
        attention_head_dim=4,
        norm_num_groups=4,
        **config,
    )


def ddim(**config: Any) -> DDIMScheduler:
    return DDIMScheduler(clip_sample=False, steps_offset=1, **config)


def stable_diffusion(**scheduler: Any) -> StableDiffusionPipeline:
    return StableDiffusionPipeline(
        vae=vae(),
        text_encoder=clip(CLIPTextModel),
        tokenizer=clip_tokenizer(),
        unet=unet(WIDTH),
        scheduler=ddim(**scheduler),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def stable_diffusion_xl(scheduler: Any = None, **of_vae: Any) -> StableDiffusionXLPipeline:
    of_unet = {
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 4,
        "projection_class_embeddings_input_dim": 6 * 4 + WIDTH,
    }
    return StableDiffusionXLPipeline(
        vae=vae(**of_vae),
        text_encoder=clip(CLIPTextModel),
        tokenizer=clip_tokenizer(),
        text_encoder_2=clip(CLIPTextModelWithProjection),
        tokenizer_2=clip_tokenizer(),
        unet=unet(2 * WIDTH, **of_unet),
        scheduler=scheduler or ddim(),
        add_watermarker=False,
    )


def stable_diffusion_3(with_t5: bool = True) -> StableDiffusion3Pipeline:
    transformer = SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=4 * WIDTH,
        caption_projection_dim=16,
        pooled_projection_dim=2 * WIDTH,
        pos_embed_max_size=8,
    )
    return StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=vae(shift_factor=0.06, scaling_factor=1.5, use_quant_conv=False),
        text_encoder=clip(CLIPTextModelWithProjection),
        tokenizer=clip_tokenizer(),
        text_encoder_2=clip(CLIPTextModelWithProjection),
        tokenizer_2=clip_tokenizer(),
        text_encoder_3=t5(4 * WIDTH) if with_t5 else None,
        tokenizer_3=t5_tokenizer() if with_t5 else None,
    )


def flux(guidance_embeds: bool = True) -> FluxPipeline:
    transformer = FluxTransformer2DModel(
        patch_size=1,
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=2 * WIDTH,
        pooled_projection_dim=WIDTH,
        guidance_embeds=guidance_embeds,
        axes_dims_rope=(2, 2, 4),
    )
    return FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        vae=vae(shift_factor=0.1, scaling_factor=0.4),
        text_encoder=clip(CLIPTextModel),
        tokenizer=clip_tokenizer(),
        text_encoder_2=t5(2 * WIDTH),
        tokenizer_2=t5_tokenizer(),
        transformer=transformer,
    )


def pixart(kind: type = PixArtSigmaPipeline, **config: Any) -> Any:
    transformer = PixArtTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=12,
        num_layers=2,
        cross_attention_dim=24,
        caption_channels=2 * WIDTH,
        in_channels=4,
        out_channels=8,
        **{"sample_size": 8} | config,
    )
    return kind(
        tokenizer=t5_tokenizer(),
        text_encoder=t5(2 * WIDTH),
        vae=vae(),
        transformer=transformer,
        scheduler=ddim(),
    )


def dit() -> DiTPipeline:
    transformer = DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        num_layers=2,
        in_channels=4,
        out_channels=8,
        sample_size=8,
    )
    return DiTPipeline(transformer=transformer, vae=vae(), scheduler=ddim())


def ddpm(**config: Any) -> DDPMPipeline:
    model = UNet2DModel(
        sample_size=16,
        in_channels=3,
        out_channels=3,
        layers_per_block=1,
        block_out_channels=(8, 16),
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=4,
        norm_num_groups=4,
        **config,
    )
    return DDPMPipeline(unet=model, scheduler=DDPMScheduler())


BASES: dict[str, Callable[[], Any]] = {
    "sd": stable_diffusion,
    "sd-v": lambda: stable_diffusion(prediction_type="v_prediction"),
    "sdxl": stable_diffusion_xl,
    "sdxl-edm": lambda: stable_diffusion_xl(
        EDMEulerScheduler(), latents_mean=[1.0, -2.0, 0.5, 0.0], latents_std=[2.0, 1.0, 4.0, 0.5]
    ),
    "sd3": stable_diffusion_3,
    "sd3-without-t5": lambda: stable_diffusion_3(with_t5=False),
    "flux": flux,
    "flux-without-guidance": lambda: flux(guidance_embeds=False),
    "pixart-sigma": pixart,
    "pixart-alpha": lambda: pixart(PixArtAlphaPipeline, sample_size=128),
    "dit": dit,
    "ddpm": ddpm,
    "ddpm-classes": lambda: ddpm(num_class_embeds=3),
}


def save(name: str, folder: Path) -> str:
    """Write the base ``name``, the same each time, and return its folder."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        BASES[name]().save_pretrained(folder)
    if name == "dit":  # names of classes, as its published folder has them
        index = Path(folder) / "model_index.json"
        names = {"id2label": {"0": "cat, kitten", "1": "dog"}}
        index.write_text(json.dumps(json.loads(index.read_text()) | names))
    return str(folder)
