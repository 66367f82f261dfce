"""The LoRA adapter of a denoiser: added by PEFT, saved in the format of diffusers."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from diffusers.loaders import SD3LoraLoaderMixin, StableDiffusionLoraLoaderMixin
from peft import LoraConfig, inject_adapter_in_model, set_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import get_peft_model_state_dict
from safetensors import safe_open
from torch import nn

from ..run import durable
from . import NoisePath, Objective, synthetic_rows
from .base import quiet

WEIGHTS_FILE = "pytorch_lora_weights.safetensors"

_ADAPTER = "default"


def add_lora(
    denoiser: nn.Module, *, rank: int, alpha: float, target_modules: tuple[str, ...], seed: int
) -> None:
    """Freeze ``denoiser`` and add a trainable float32 LoRA adapter to each layer named.

    A layer matches when its name is, or ends in a dot and, one of ``target_modules``. ``seed``
    fixes the initial weights, which are public.

    Raises ValueError for a name that matches no linear layer or convolution, with the names that
    exist, and for a rank that no layer named has.
    """
    kinds = nn.Linear | nn.Conv1d | nn.Conv2d
    layers = {name: layer for name, layer in denoiser.named_modules() if isinstance(layer, kinds)}
    for target in target_modules:
        if not any(_named(name, (target,)) for name in layers):
            raise ValueError(
                f"target module {target!r} matches no linear layer or convolution of the "
                f"{type(denoiser).__name__}; the names that exist are "
                f"{', '.join(sorted(set(map(_short_name, layers))))}"
            )
    largest = max(
        min(layers[n].weight.flatten(1).shape) for n in layers if _named(n, target_modules)
    )
    if rank > largest:
        raise ValueError(
            f"rank must be at most {largest}, the full rank of the largest layer named, got {rank}"
        )
    config = LoraConfig(r=rank, lora_alpha=alpha, target_modules=list(target_modules))
    denoiser.requires_grad_(False)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        _inject(config, denoiser)


@contextmanager
def disabled(denoiser: nn.Module) -> Iterator[None]:
    """Run the base model alone inside the context."""
    layers = [layer for layer in denoiser.modules() if isinstance(layer, BaseTunerLayer)]
    trained = [param for param in denoiser.parameters() if param.requires_grad]
    for layer in layers:
        layer.enable_adapters(False)
    try:
        yield
    finally:
        for layer in layers:
            layer.enable_adapters(True)
        denoiser.requires_grad_(False)  # PEFT makes all of an adapter trainable as it enables it
        for param in trained:
            param.requires_grad_(True)


def save_lora(denoiser: nn.Module, folder: Path, part: str = "unet") -> None:
    """Write the adapter so that ``load_lora_weights(folder)`` of a diffusers pipeline reads it.

    part: name of the denoiser in its pipeline, `unet` or `transformer`.

    lora_b is multiplied by alpha / rank, so that alpha is the rank in the file, whoever reads it:
    without the metadata of diffusers and PEFT that is the default, and `.alpha` beside the factors
    is refused by some pipelines and not read by others.
    """
    config = denoiser.peft_config[_ADAPTER]
    metadata = config.to_dict() | {"lora_alpha": config.r}
    metadata["target_modules"] = sorted(metadata["target_modules"])
    scale = config.lora_alpha / config.r
    # PEFT's own names, for all layers: the older ones of diffusers exist for attention alone, and
    # of a file with both kinds one is dropped as it is loaded.
    state = {
        name: (scale * tensor if name.endswith("lora_B.weight") else tensor.clone())
        for name, tensor in _state(denoiser).items()
    }
    layers = {f"{part}_lora_layers": state, f"{part}_lora_adapter_metadata": metadata}
    writer = StableDiffusionLoraLoaderMixin if part == "unet" else SD3LoraLoaderMixin
    with TemporaryDirectory() as draft:
        writer.save_lora_weights(draft, **layers)
        content = Path(draft, WEIGHTS_FILE).read_bytes()
    durable.write(folder / WEIGHTS_FILE, _in_order(content))


def load_lora(pipeline: Any, folder: Path | str) -> None:
    """Add the adapter that ``save_lora`` wrote to ``folder`` to the pipeline's denoiser.

    By the pipeline's own ``load_lora_weights`` where it has one. PixArt, DiT and `UNet2DModel` have
    none in diffusers, and get the same by PEFT.
    """
    if hasattr(pipeline, "load_lora_weights"):
        with quiet():  # diffusers looks for adapters of the text encoders as well
            pipeline.load_lora_weights(folder, weight_name=WEIGHTS_FILE, use_safetensors=True)
        return
    part = part_of(pipeline)
    with safe_open(Path(folder) / WEIGHTS_FILE, "pt") as file:
        names = list(file.keys())
        state = {name.removeprefix(f"{part}."): file.get_tensor(name) for name in names}
        metadata = json.loads(file.metadata()["lora_adapter_metadata"])
    config = {name.removeprefix(f"{part}."): value for name, value in metadata.items()}
    denoiser = getattr(pipeline, part)
    _inject(LoraConfig(**config), denoiser)
    found = set_peft_model_state_dict(denoiser, state, _ADAPTER)
    if found.unexpected_keys:
        raise ValueError(f"the adapter has tensors of no layer: {found.unexpected_keys[0]}")


def part_of(pipeline: Any) -> str:
    """The name of a pipeline's denoiser, which is the prefix of its tensors in an adapter file."""
    return "unet" if getattr(pipeline, "unet", None) is not None else "transformer"


@torch.no_grad()
def check_loads_back(objective: Objective, path: NoisePath, folder: Path, fresh: Objective) -> None:
    """Raise ValueError unless the file in ``folder`` makes of a ``fresh`` base what was trained.

    All tensors must arrive, with their bits, and answers on noise must be equal but for rounding.
    """
    trained = _factors(objective.denoiser)
    try:
        load_lora(fresh.pipeline, folder)
        loaded = _factors(fresh.denoiser)
    except (RuntimeError, KeyError) as error:  # as of a tensor that stayed without values
        raise ValueError(
            f"the adapter file cannot be loaded back whole ({error}); choose other target_modules"
        ) from error
    if trained.keys() != loaded.keys():
        lost = sorted(trained.keys() - loaded.keys())
        raise ValueError(
            f"the adapter file cannot be loaded back whole: {len(loaded)} of {len(trained)} "
            f"tensors arrive, not {lost[0] if lost else 'those alone'}; choose other target_modules"
        )
    for name, tensor in trained.items():
        if not torch.equal(tensor, loaded[name]):
            raise ValueError(
                f"the adapter file loads back with another {name}; its disk may be bad"
            )
    rows = synthetic_rows(objective, path, 2)
    fresh.pipeline.to(objective.denoiser.device)
    objective.denoiser.eval()
    fresh.denoiser.eval()
    ours, theirs = (
        model.predict(rows["latents"], path.steps[rows["times"]], rows)
        for model in (objective, fresh)
    )
    # NaN on both sides is told by those who draw images.
    if not torch.allclose(ours, theirs, rtol=1e-3, atol=1e-4, equal_nan=True):
        raise ValueError(
            "the adapter file, loaded into a fresh base, gives other outputs than the trained "
            "model; the base may have changed meanwhile: restore it, and finish by --resume"
        )


def _inject(config: LoraConfig, denoiser: nn.Module) -> None:
    """As `add_adapter` of diffusers' models, for those too that have no such method."""
    inject_adapter_in_model(config, denoiser, adapter_name=_ADAPTER)
    denoiser._hf_peft_config_loaded = True
    denoiser.peft_config = {_ADAPTER: config}


def _state(denoiser: nn.Module) -> dict[str, torch.Tensor]:
    state = get_peft_model_state_dict(denoiser, adapter_name=_ADAPTER)
    return {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}


def _factors(denoiser: nn.Module) -> dict[str, torch.Tensor]:
    """Each factor of the adapter by its layer's name, on the CPU; B times the layer's strength."""
    found = {}
    for name, layer in denoiser.named_modules():
        for side in ("lora_A", "lora_B"):
            for adapter, factor in (getattr(layer, side, None) or {}).items():
                strength = layer.scaling[adapter] if side == "lora_B" else 1.0
                found[f"{name}.{side}"] = strength * factor.weight.detach().float().cpu()
    return found


def _in_order(content: bytes) -> bytes:
    """The same with its metadata sorted: safetensors writes them in an order of chance."""
    end = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:end])
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + content[end:]


def _named(layer: str, targets: tuple[str, ...]) -> bool:
    return any(layer == target or layer.endswith(f".{target}") for target in targets)


def _short_name(name: str) -> str:
    """The last part of a layer's name, with its number where it ends in one: `to_q`, `to_out.0`."""
    parts = name.split(".")
    start = len(parts) - (2 if parts[-1].isdigit() else 1)
    return ".".join(parts[max(start, 0) :])
