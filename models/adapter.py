"""The LoRA adapter of a UNet: added by PEFT, saved in the format of diffusers."""

import json
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from torch import nn

from ..run import durable
from . import ClassConditionalPipeline

WEIGHTS_FILE = "pytorch_lora_weights.safetensors"

_ADAPTER = "default"


def add_lora(
    unet: nn.Module, *, rank: int, alpha: float, target_modules: tuple[str, ...], seed: int
) -> None:
    """Freeze ``unet`` and add a trainable float32 LoRA adapter to each layer named.

    A layer matches when its name is, or ends in a dot and, one of ``target_modules``. ``seed``
    fixes the initial weights, which are public.

    Raises ValueError for a name that matches no linear layer or convolution, with the names that
    exist, and for a rank that no layer named has.
    """
    kinds = nn.Linear | nn.Conv1d | nn.Conv2d
    layers = {name: layer for name, layer in unet.named_modules() if isinstance(layer, kinds)}
    for target in target_modules:
        if not any(_named(name, (target,)) for name in layers):
            raise ValueError(
                f"target module {target!r} matches no linear layer or convolution of the UNet; the "
                f"names that exist are {', '.join(sorted(set(map(_short_name, layers))))}"
            )
    largest = max(
        min(layers[n].weight.flatten(1).shape) for n in layers if _named(n, target_modules)
    )
    if rank > largest:
        raise ValueError(
            f"rank must be at most {largest}, the full rank of the largest layer named, got {rank}"
        )
    config = LoraConfig(
        r=rank,
        lora_alpha=alpha,
        target_modules=list(target_modules),
    )
    unet.requires_grad_(False)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        unet.add_adapter(config, adapter_name=_ADAPTER)


def save_lora(unet: nn.Module, folder: Path) -> None:
    """Write the adapter so that ``load_lora_weights(folder)`` of a diffusers pipeline reads it.

    Where alpha is not the rank, an `.alpha` stands beside the factors of each layer: readers that
    know nothing of the metadata of diffusers and PEFT take the strength of the adapter from it.
    """
    config = unet.peft_config[_ADAPTER]
    metadata = config.to_dict()
    metadata["target_modules"] = sorted(metadata["target_modules"])
    # PEFT's own names, for all layers: the older ones of diffusers exist for attention alone, and
    # of a file with both kinds one is dropped as it is loaded.
    state = {n: t.detach().cpu().contiguous() for n, t in get_peft_model_state_dict(unet).items()}
    if config.lora_alpha != config.r:
        layers = [n.removesuffix(".lora_A.weight") for n in state if n.endswith(".lora_A.weight")]
        alpha = torch.tensor(float(config.lora_alpha))
        if alpha.half() == alpha:  # as other trainers write it; it then stands behind the factors
            alpha = alpha.half()
        state |= {f"{layer}.alpha": alpha.clone() for layer in layers}
    with TemporaryDirectory() as draft:
        ClassConditionalPipeline.save_lora_weights(
            draft, unet_lora_layers=state, unet_lora_adapter_metadata=metadata
        )
        content = Path(draft, WEIGHTS_FILE).read_bytes()
    durable.write(folder / WEIGHTS_FILE, _in_order(content))


@torch.no_grad()
def check_loads_back(unet: nn.Module, folder: Path, fresh: ClassConditionalPipeline) -> None:
    """Raise ValueError unless the file in ``folder`` makes of a ``fresh`` base what ``unet`` is.

    All tensors must arrive, with their bits and strength, and outputs on noise must be equal but
    for rounding.
    """
    fresh.load_lora_weights(folder, weight_name=WEIGHTS_FILE, use_safetensors=True)
    trained, loaded = (_factors(model) for model in (unet, fresh.unet))
    if trained.keys() != loaded.keys():
        lost = sorted(trained.keys() - loaded.keys())
        raise ValueError(
            f"the adapter file cannot be loaded back whole: {len(loaded)} of {len(trained)} "
            f"tensors arrive, not {lost[0] if lost else 'those alone'}; choose other target_modules"
        )
    for name, (tensor, scaling) in trained.items():
        if scaling != loaded[name][1] or not torch.equal(tensor, loaded[name][0]):
            raise ValueError(
                f"the adapter file loads back with another {name}; its disk may be bad"
            )
    config, device = unet.config, next(unet.parameters()).device
    generator = torch.Generator().manual_seed(0)
    shape = (2, config.in_channels, config.sample_size, config.sample_size)
    noise = torch.randn(shape, generator=generator)
    tokens = torch.randn((2, 1, config.cross_attention_dim), generator=generator)
    inputs = [t.to(device) for t in (noise, torch.tensor([10, 500]), tokens)]
    ours, theirs = (model.eval()(*inputs).sample for model in (unet, fresh.unet.to(device)))
    # NaN on both sides is told by those who draw images.
    if not torch.allclose(ours, theirs, rtol=1e-3, atol=1e-4, equal_nan=True):
        raise ValueError(
            "the adapter file, loaded into a fresh base, gives other outputs than the trained "
            "model; the base may have changed meanwhile: restore it, and finish by --resume"
        )


def _factors(unet: nn.Module) -> dict[str, tuple[torch.Tensor, float]]:
    """Each factor of the adapter by its layer's name, on the CPU, and the strength of its layer."""
    found = {}
    for name, layer in unet.named_modules():
        for side in ("lora_A", "lora_B"):
            for adapter, factor in (getattr(layer, side, None) or {}).items():
                tensor = factor.weight.detach().float().cpu()
                found[f"{name}.{side}"] = tensor, layer.scaling[adapter]
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
