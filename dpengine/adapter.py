"""The LoRA adapter of a UNet: added by PEFT, saved in the format of diffusers."""

import json
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from diffusers.utils import convert_state_dict_to_diffusers
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from torch import nn

from . import durable
from .models import ClassConditionalPipeline

WEIGHTS_FILE = "pytorch_lora_weights.safetensors"

_ADAPTER = "default"


def add_lora(
    unet: nn.Module, *, rank: int, alpha: float, target_modules: tuple[str, ...], seed: int
) -> None:
    """Freeze ``unet`` and add a trainable float32 LoRA adapter to each layer named.

    A layer matches when its name is, or ends in a dot and, one of ``target_modules``. ``seed``
    fixes the initial weights, which are public.

    Raises ValueError for a name that matches no linear layer or convolution, with the names that
    exist.
    """
    kinds = nn.Linear | nn.Conv1d | nn.Conv2d
    layers = {name for name, module in unet.named_modules() if isinstance(module, kinds)}
    for target in target_modules:
        if not any(name == target or name.endswith(f".{target}") for name in layers):
            raise ValueError(
                f"target module {target!r} matches no linear layer or convolution of the UNet; the "
                f"names that exist are {', '.join(sorted(set(map(_short_name, layers))))}"
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
    """Write the adapter so that ``load_lora_weights(folder)`` of a diffusers pipeline reads it."""
    metadata = unet.peft_config[_ADAPTER].to_dict()
    metadata["target_modules"] = sorted(metadata["target_modules"])
    state = convert_state_dict_to_diffusers(get_peft_model_state_dict(unet))
    with TemporaryDirectory() as draft:
        ClassConditionalPipeline.save_lora_weights(
            draft,
            unet_lora_layers={name: tensor.contiguous() for name, tensor in state.items()},
            unet_lora_adapter_metadata=metadata,
        )
        content = Path(draft, WEIGHTS_FILE).read_bytes()
    durable.write(folder / WEIGHTS_FILE, _in_order(content))


def _in_order(content: bytes) -> bytes:
    """The same with its metadata sorted: safetensors writes them in an order of chance."""
    end = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:end])
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + content[end:]


def _short_name(name: str) -> str:
    """The last part of a layer's name, with its number where it ends in one: `to_q`, `to_out.0`."""
    parts = name.split(".")
    start = len(parts) - (2 if parts[-1].isdigit() else 1)
    return ".".join(parts[max(start, 0) :])
