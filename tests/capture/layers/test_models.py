"""Whole models of diffusers with random weights, record by record against a float64 loop."""

from collections.abc import Callable

import diffusers
import pytest
import torch
from diffusers.models.embeddings import LabelEmbedding
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor, nn

DRAWS, N = 2, 3
ROWS = DRAWS * N


def unet() -> nn.Module:
    return diffusers.UNet2DModel(
        sample_size=8,
        in_channels=1,
        out_channels=1,
        layers_per_block=1,
        block_out_channels=(8, 16),
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=4,
        norm_num_groups=4,
    )


def conditional_unet() -> nn.Module:
    return diffusers.UNet2DConditionModel(
        sample_size=8,
        in_channels=1,
        out_channels=1,
        layers_per_block=1,
        block_out_channels=(8, 16),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=6,
        attention_head_dim=4,
        norm_num_groups=4,
    )


def dit() -> nn.Module:
    model = diffusers.DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=4,
        in_channels=2,
        out_channels=2,
        num_layers=2,
        sample_size=4,
        patch_size=2,
        num_embeds_ada_norm=10,
    )
    for module in model.modules():
        if isinstance(module, LabelEmbedding):
            module.dropout_prob = 0.0  # drops labels at random in training
    return model


def pixart() -> nn.Module:
    return diffusers.PixArtTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=4,
        in_channels=2,
        out_channels=2,
        num_layers=2,
        cross_attention_dim=8,
        caption_channels=6,
        sample_size=4,
        patch_size=2,
        use_additional_conditions=False,
    )


def sd3() -> nn.Module:
    return diffusers.SD3Transformer2DModel(
        sample_size=4,
        patch_size=2,
        in_channels=2,
        out_channels=2,
        num_layers=2,
        attention_head_dim=4,
        num_attention_heads=2,
        joint_attention_dim=6,
        caption_projection_dim=8,
        pooled_projection_dim=5,
        pos_embed_max_size=4,
        qk_norm="rms_norm",
    )


def flux() -> nn.Module:
    return diffusers.FluxTransformer2DModel(
        patch_size=1,
        in_channels=4,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=6,
        pooled_projection_dim=5,
        axes_dims_rope=(2, 2, 4),
    )


def call_unet(model, sample, timestep):
    return model(sample, timestep).sample


def call_conditional(model, sample, timestep, states):
    return model(sample, timestep, encoder_hidden_states=states).sample


def call_dit(model, sample, timestep, labels):
    return model(sample, timestep, class_labels=labels).sample


def call_pixart(model, sample, timestep, states):
    none = {"resolution": None, "aspect_ratio": None}
    return model(
        sample, encoder_hidden_states=states, timestep=timestep, added_cond_kwargs=none
    ).sample


def call_sd3(model, sample, timestep, states, pooled):
    return model(sample, states, pooled, timestep).sample


def call_flux(model, sample, timestep, states, pooled):
    """Positions are shared by all rows."""
    return model(
        hidden_states=sample,
        encoder_hidden_states=states,
        pooled_projections=pooled,
        timestep=timestep.to(sample) / 1000,
        img_ids=torch.arange(12).view(4, 3).to(sample),
        txt_ids=torch.zeros(3, 3).to(sample),
    ).sample


IMAGE, STATES, POOLED, TIMES, LABELS = (2, 4, 4), (3, 6), (5,), 1000, 10
Case = tuple[Callable[[], nn.Module], Callable[..., Tensor], tuple]
MODELS: dict[str, Case] = {
    "UNet2DModel": (unet, call_unet, ((1, 8, 8), TIMES)),
    "UNet2DConditionModel": (conditional_unet, call_conditional, ((1, 8, 8), TIMES, STATES)),
    "DiT": (dit, call_dit, (IMAGE, TIMES, LABELS)),
    "PixArt": (pixart, call_pixart, (IMAGE, TIMES, STATES)),
    "SD3": (sd3, call_sd3, (IMAGE, TIMES, STATES, POOLED)),
    "Flux": (flux, call_flux, ((4, 4), TIMES, STATES, POOLED)),
}
every_model = pytest.mark.parametrize("make, call, inputs", MODELS.values(), ids=MODELS)


def batch(inputs: tuple, rows) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [
        rows(ROWS, *of, seed=seed)
        if isinstance(of, tuple)
        else torch.randint(of, (ROWS,), generator=generator)
        for seed, of in enumerate(inputs)
    ]


def adapted(make: Callable[[], nn.Module], targets: list[str] | str) -> nn.Module:
    """Random weights, and LoRA on ``targets``; nothing of the base is trained."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = make().requires_grad_(False)
        for param in model.parameters():  # some projections start at zero, and hide what precedes
            if param.ndim > 1 and not param.any():
                nn.init.normal_(param, std=0.3)
        config = LoraConfig(r=2, lora_alpha=3.0, target_modules=targets)
        return inject_adapter_in_model(config, model)


SD3_UNUSED = "blocks.1.attn.norm_added_q.weight"
ATTENTION = ["to_q", "to_k", "to_v", "to_out.0"]


@every_model
def test_lora_on_the_attention_projections(compare, randomized, rows, make, call, inputs):
    model = adapted(make, ATTENTION)
    assert len(compare(randomized(model), *batch(inputs, rows), draws=DRAWS, call=call)) >= 8


@every_model
def test_lora_and_norms_with_checkpointing(compare, randomized, rows, make, call, inputs):
    """With non-reentrant recomputation; the norms in full, by a rule or by `torch.func`."""
    model = adapted(make, ATTENTION)
    for module in model.modules():
        own = list(module.parameters(recurse=False))
        if "Norm" in type(module).__name__ and own:
            module.requires_grad_(True)
    model.enable_gradient_checkpointing()
    # The last block of SD3 asks nothing of its context.
    unused = [name for name in dict(model.named_parameters()) if name.endswith(SD3_UNUSED)]
    compare(randomized(model), *batch(inputs, rows), draws=DRAWS, call=call, unused=unused)
