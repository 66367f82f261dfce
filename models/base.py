"""The public base model, by name, folder or hub id: looked through before anything of it is run."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from diffusers import DDPMScheduler, DiffusionPipeline
from huggingface_hub import hf_hub_download
from safetensors import SafetensorError

from . import DEFAULT_BASE, ClassConditionalPipeline

_HOW = "docs/bases.md says how a base for this command is made"

SCHEDULERS = (
    *("DDIMScheduler", "DDPMScheduler", "DEISMultistepScheduler", "DPMSolverMultistepScheduler"),
    *("DPMSolverSinglestepScheduler", "EulerAncestralDiscreteScheduler", "EulerDiscreteScheduler"),
    *("HeunDiscreteScheduler", "KDPM2AncestralDiscreteScheduler", "KDPM2DiscreteScheduler"),
    *("LMSDiscreteScheduler", "PNDMScheduler", "UniPCMultistepScheduler"),
)
"""Samplers of models that were trained by DDPM's law of noise, which is the law trained here."""

_CLASSES = {
    "unet": ("UNet2DConditionModel",),
    "scheduler": SCHEDULERS,
    "class_embedding": ("ClassEmbedding",),
    "vae": ("AutoencoderKL",),
}
_LIBRARIES = {"class_embedding": ("dpengine.models.pipeline", "pipeline", "dpengine")}

_UNTAKEN = (
    *("addition_embed_type", "class_embed_type", "encoder_hid_dim", "encoder_hid_dim_type"),
    *("time_cond_proj_dim", "num_class_embeds"),
)
"""Inputs of a UNet beyond image, timestep and tokens."""


def load_base(base: str) -> ClassConditionalPipeline:
    """Load ``base``: `default` (embedded), a diffusers folder, or the hub id of one. Float32.

    Its index is read first: components are of known classes of diffusers, and no code that a
    folder names is run. Raises ValueError, with the cause and the way out, where it is no
    class-conditional pipeline, cannot be read, or asks for what training does not do.
    """
    folder = DEFAULT_BASE if base == "default" else _folder(base)
    _check_index(_read_json(folder / "model_index.json", base), base)
    for name in ("unet", "class_embedding", "vae"):
        _check_weights(folder / name)
    try:
        pipeline = ClassConditionalPipeline.from_pretrained(folder, use_safetensors=True)
    except (
        *(OSError, ValueError, TypeError, KeyError, AttributeError, ImportError),
        *(RuntimeError, SafetensorError),
    ) as error:
        reason = next(iter(str(error).splitlines()), "") or type(error).__name__
        raise ValueError(
            f"base {base!r} is no class-conditional diffusers pipeline that can be loaded: "
            f"{reason}; {_HOW}"
        ) from error
    _check_parts(pipeline, base)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def _folder(base: str) -> Path:
    """The folder of ``base``, fetched from the hub where it is an id."""
    if Path(base).exists():
        if Path(base).is_dir():
            return Path(base)
        raise ValueError(
            f"base {base!r} must be the folder of a diffusers pipeline, got a file; {_HOW}"
        )
    try:
        _check_index(_read_json(Path(hf_hub_download(base, "model_index.json")), base), base)
        return Path(DiffusionPipeline.download(base, use_safetensors=True))
    except (OSError, ValueError, RuntimeError) as error:
        if str(error).startswith("base "):
            raise
        reason = next(iter(str(error).splitlines()), "") or type(error).__name__
        raise ValueError(
            f"base {base!r} is no class-conditional diffusers pipeline: there is no such folder, "
            f"and as a hub id it cannot be fetched ({reason}). Check spelling and connection; or "
            "give 'default', or a folder with model_index.json, unet, scheduler and class_embedding"
        ) from error


def _read_json(file: Path, base: str) -> dict[str, Any]:
    if not file.is_file():
        raise ValueError(
            f"base {base!r} is no class-conditional diffusers pipeline: it has no {file.name}; it "
            "must be 'default', or a folder or hub id with model_index.json, unet, scheduler and "
            f"class_embedding; {_HOW}"
        )
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(
            f"base {base!r} cannot be read: {file} is no JSON; copy it again"
        ) from error
    if not isinstance(content, dict):
        raise ValueError(f"base {base!r} cannot be read: {file} must hold a JSON object")
    return content


def _check_index(index: dict[str, Any], base: str) -> None:
    """Raise ValueError for components of other classes than those known, before any is imported."""
    kind = index.get("_class_name")
    if kind != "ClassConditionalPipeline":
        raise ValueError(
            f"base {base!r} is a {kind}, and this command trains class-conditional pipelines, with "
            "unet, scheduler and class_embedding; its UNet can be trained in a loop of your own "
            f"with PrivacyEngine; {_HOW}"
        )
    for name in [name for name in index if not name.startswith("_")]:
        entry = index[name]
        if name == "vae" and entry in (None, [None, None]):
            continue
        libraries = _LIBRARIES.get(name, ("diffusers",))
        known = isinstance(entry, list) and len(entry) == 2 and entry[0] in libraries
        if not known or entry[1] not in _CLASSES.get(name, ()):
            allowed = ", ".join(_CLASSES.get(name, ("nothing of that name",)))
            raise ValueError(
                f"base {base!r} has the {name} {entry}; known are, of {libraries[0]}: {allowed}. "
                "Others may mean another law of noise, and no code of a base is ever run"
            )
    missing = {"unet", "scheduler", "class_embedding"} - set(index)
    if missing:
        raise ValueError(f"base {base!r} lacks {', '.join(sorted(missing))}; {_HOW}")


def _check_weights(component: Path) -> None:
    """Raise ValueError that names the file where a component's weights cannot be read."""
    if not component.is_dir():
        return
    files = sorted(component.glob("*.safetensors"))
    for file in files:
        with file.open("rb") as handle:
            if handle.read(40).startswith(b"version https://git-lfs"):
                raise ValueError(
                    f"{file} is a pointer of Git LFS and not the weights; run `git lfs pull` there"
                )
    plain = [f for f in files if not any(f".{v}." in f.name for v in ("fp16", "bf16", "non_ema"))]
    if plain:
        return
    others = sorted(f.name for f in component.iterdir() if f.suffix in (".bin", ".pt", ".ckpt"))
    if files:
        raise ValueError(
            f"{component} has the weights of a variant only, {files[0].name}; save them without "
            "one, as pipeline.save_pretrained does"
        )
    found = f"{others[0]}, which may run code as it is read" if others else "no weights"
    raise ValueError(
        f"{component} must hold weights as .safetensors, got {found}; save it with "
        "save_pretrained(folder, safe_serialization=True)"
    )


def _check_parts(pipeline: ClassConditionalPipeline, base: str) -> None:
    """Raise ValueError for a configuration that training or sampling would not follow."""

    def refuse(what: str) -> None:
        raise ValueError(f"base {base!r} cannot be used: {what}; {_HOW}")

    unet, vae = pipeline.unet.config, pipeline.vae
    size = unet.sample_size
    if isinstance(size, bool) or not isinstance(size, int) or size < 1:
        refuse(f"the unet's sample_size must be one whole number, pixels of a side, got {size}")
    for name in _UNTAKEN:
        if unet.get(name) is not None:
            refuse(
                f"the unet has {name} = {unet[name]!r}, an input that this command does not give"
            )
    if unet.in_channels != unet.out_channels:
        refuse(
            f"the unet must give as many channels as it takes, got out_channels "
            f"{unet.out_channels} and in_channels {unet.in_channels}"
        )
    if vae is not None:
        if vae.config.latent_channels != unet.in_channels:
            refuse(
                f"the vae gives {vae.config.latent_channels} channels and the unet takes "
                f"{unet.in_channels}"
            )
        for name in ("shift_factor", "latents_mean", "latents_std"):
            if vae.config.get(name) is not None:
                refuse(f"the vae has {name}, and latents are scaled by scaling_factor alone here")
        if vae.config.in_channels != vae.config.out_channels:
            refuse("the vae's in_channels and out_channels must be equal")
    if pipeline.image_channels not in (1, 3):
        refuse(f"images must have 1 or 3 channels, got {pipeline.image_channels}")
    names = pipeline.class_embedding.config.class_names
    if not all(isinstance(name, str) for name in names):
        refuse(f"class_names of class_embedding must be texts (strings), got {names[:3]}")
    _check_scheduler(pipeline.scheduler, refuse)
    for part, module in (("unet", pipeline.unet), ("class_embedding", pipeline.class_embedding)):
        for name, tensor in module.state_dict().items():
            if not torch.isfinite(tensor).all():
                refuse(f"the {part}'s tensor {name} has values that are not finite, NaN or Inf")


def _check_scheduler(scheduler: Any, refuse: Callable[[str], None]) -> None:
    config = scheduler.config
    if config.prediction_type not in ("epsilon", "v_prediction"):
        refuse(
            "the scheduler's prediction_type must be 'epsilon' or 'v_prediction', got "
            f"{config.prediction_type!r}"
        )
    trained = DDPMScheduler.from_config(config).alphas_cumprod
    same = len(trained) == len(scheduler.alphas_cumprod) and torch.allclose(
        trained, scheduler.alphas_cumprod, rtol=1e-4, atol=1e-6
    )
    if config.get("use_flow_sigmas") or not same:
        refuse(
            "the scheduler's law of noise is not DDPM's of the same betas, which is trained here"
        )
