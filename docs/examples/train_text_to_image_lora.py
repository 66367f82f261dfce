"""Fine-tune a text-to-image model with LoRA, privately, in a loop of accelerate and diffusers.

--train_data_dir holds images and a metadata.jsonl with a line {"file_name": ..., "text": ...} for
each. The shape is that of diffusers' examples/text_to_image/train_text_to_image_lora.py; comments
that begin with "private:" say what differs from it, and why.
"""

import argparse
import json
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from diffusers import AutoencoderKL, DDPMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.optimization import get_scheduler
from diffusers.training_utils import cast_training_params
from diffusers.utils import convert_state_dict_to_diffusers
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from PIL import Image, ImageOps
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from transformers import CLIPTextModel, CLIPTokenizer

from dpengine import BatchMemoryManager, PrivacyEngine, secure_integers, secure_normal_like

FORMATS = ("PNG", "JPEG", "WEBP")  # private: of Pillow's others, EPS starts a program


def parse_args(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pretrained_model_name_or_path", required=True)
    parser.add_argument("--train_data_dir", type=Path, required=True)
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--resolution", type=int, default=512)
    parser.add_argument("--rank", type=int, default=4)
    parser.add_argument("--train_batch_size", type=int, default=64, help="expected, the divisor")
    parser.add_argument("--max_physical_batch_size", type=int, default=8, help="what memory holds")
    parser.add_argument("--num_train_epochs", type=int, default=10)
    parser.add_argument("--max_train_steps", type=int, help="noisy updates, in place of epochs")
    parser.add_argument("--learning_rate", type=float, default=1e-4)
    parser.add_argument("--lr_scheduler", default="constant")
    parser.add_argument("--lr_warmup_steps", type=int, default=0)
    parser.add_argument("--mixed_precision", choices=("no", "bf16"), default="no")
    parser.add_argument("--gradient_checkpointing", action="store_true")
    parser.add_argument("--dataloader_num_workers", type=int, default=0)
    parser.add_argument("--target_epsilon", type=float, required=True)
    parser.add_argument("--target_delta", type=float, required=True)
    parser.add_argument("--max_grad_norm", type=float, default=1.0, help="of one record")
    parser.add_argument(
        "--sample_rate",
        type=float,
        help="train_batch_size over a public number of images; without it their true number is "
        "public",
    )
    return parser.parse_args(arguments)


class CaptionedImages(Dataset):
    """Pixels in [-1, 1], float32 [3, R, R], and the tokens of the caption, int64 [L]."""

    def __init__(self, folder: Path, tokenizer: CLIPTokenizer, resolution: int) -> None:
        # Not splitlines(), which cuts captions at U+2028 and its like.
        lines = (folder / "metadata.jsonl").read_text(encoding="utf-8").split("\n")
        self._records = [json.loads(line) for line in lines if line.strip()]
        self._folder, self._tokenizer, self._resolution = folder, tokenizer, resolution

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, number: int) -> dict[str, Tensor]:
        record, size = self._records[number], (self._resolution, self._resolution)
        with Image.open(self._folder / record["file_name"], formats=FORMATS) as image:
            upright = ImageOps.exif_transpose(image).convert("RGB")
            # private: no random flip or crop: workers draw them from seeds that torch keeps.
            pixels = np.asarray(ImageOps.fit(upright, size), dtype=np.float32)
        # private: padded to a constant; to the longest caption of a batch, one record would change
        # what is computed for all others.
        tokens = self._tokenizer(
            record["text"],
            padding="max_length",
            max_length=self._tokenizer.model_max_length,
            truncation=True,
            return_tensors="pt",
        )
        return {
            "pixel_values": torch.from_numpy(pixels / 127.5 - 1).permute(2, 0, 1),
            "input_ids": tokens.input_ids[0],
        }


class Frozen:
    """What is not trained: text encoder, autoencoder and noise schedule."""

    def __init__(self, path: str, device: torch.device, dtype: torch.dtype) -> None:
        text_encoder = CLIPTextModel.from_pretrained(path, subfolder="text_encoder")
        vae = AutoencoderKL.from_pretrained(path, subfolder="vae")
        self.text_encoder = text_encoder.requires_grad_(False).to(device, dtype)
        self.vae = vae.requires_grad_(False).to(device, dtype)
        self.noise_scheduler = DDPMScheduler.from_pretrained(path, subfolder="scheduler")


def load_unet(args: argparse.Namespace, device: torch.device, dtype: torch.dtype):
    """The UNet, frozen but for a LoRA adapter, in training mode."""
    unet = UNet2DConditionModel.from_pretrained(
        args.pretrained_model_name_or_path, subfolder="unet"
    )
    unet.requires_grad_(False).to(device, dtype)
    targets = ["to_k", "to_q", "to_v", "to_out.0"]
    unet.add_adapter(
        LoraConfig(
            r=args.rank, lora_alpha=args.rank, init_lora_weights="gaussian", target_modules=targets
        )
    )
    cast_training_params(unet, dtype=torch.float32)
    if args.gradient_checkpointing:
        unet.enable_gradient_checkpointing()
    return unet.train()


def mean_loss(unet: UNet2DConditionModel, frozen: Frozen, batch: dict[str, Tensor]) -> Tensor:
    """The mean over rows of each row's mean squared error."""
    # private: secret draws in place of torch's, whose few seeds can be tried one after another.
    posterior = frozen.vae.encode(batch["pixel_values"].to(frozen.vae.dtype)).latent_dist
    latents = posterior.mean + posterior.std * secure_normal_like(posterior.mean)
    latents = latents * frozen.vae.config.scaling_factor
    scheduler, noise = frozen.noise_scheduler, secure_normal_like(latents)
    timesteps = secure_integers(
        0, scheduler.config.num_train_timesteps, (len(latents),), device=latents.device
    )
    noisy = scheduler.add_noise(latents, noise, timesteps)
    states = frozen.text_encoder(batch["input_ids"], return_dict=False)[0]
    is_noise = scheduler.config.prediction_type == "epsilon"
    target = noise if is_noise else scheduler.get_velocity(latents, noise, timesteps)
    predicted = unet(noisy, timesteps, states, return_dict=False)[0]
    # private: one loss for each row and their plain mean; weights that are normalised over the
    # batch, or a mean over what a mask leaves of it, would let a record into the others' gradients.
    return (predicted.float() - target.float()).square().flatten(1).mean(1).mean()


def main(arguments: list[str] | None = None) -> None:
    args = parse_args(arguments)
    # private: one process, no fp16 with its GradScaler, and no gradient_accumulation_steps.
    accelerator = Accelerator(mixed_precision=args.mixed_precision)
    device = accelerator.device
    dtype = torch.bfloat16 if args.mixed_precision == "bf16" else torch.float32
    path = args.pretrained_model_name_or_path
    frozen, unet = Frozen(path, device, dtype), load_unet(args, device, dtype)
    tokenizer = CLIPTokenizer.from_pretrained(path, subfolder="tokenizer")
    loader = DataLoader(
        CaptionedImages(args.train_data_dir, tokenizer, args.resolution),
        batch_size=args.train_batch_size,
        num_workers=args.dataloader_num_workers,
    )
    trained = [param for param in unet.parameters() if param.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=args.learning_rate)
    # private: from here on batches are Poisson samples, charged before they are drawn.
    engine, memory = PrivacyEngine(), ExitStack()
    unet, optimizer, loader = engine.make_private_with_epsilon(
        module=unet,
        optimizer=optimizer,
        data_loader=loader,
        target_epsilon=args.target_epsilon,
        target_delta=args.target_delta,
        epochs=None if args.max_train_steps else args.num_train_epochs,
        num_steps=args.max_train_steps,
        max_grad_norm=args.max_grad_norm,
        sample_rate=args.sample_rate,
        # private: in half precision a mean over a private number of rows is rounded by it.
        static_batch=args.max_physical_batch_size if args.mixed_precision == "bf16" else None,
    )
    num_steps = args.max_train_steps or args.num_train_epochs * len(loader)
    lr_scheduler = get_scheduler(
        args.lr_scheduler,
        optimizer=optimizer,
        num_warmup_steps=args.lr_warmup_steps,
        num_training_steps=num_steps,
    )
    # private: after updates only. A step in the loop would count physical batches, and so images;
    # accelerate's step_was_skipped knows of overflows alone.
    optimizer.original_optimizer.register_step_post_hook(lambda *_: lr_scheduler.step())
    # private: in place of accelerator.accumulate, and before prepare, which moves its batches.
    loader = memory.enter_context(
        BatchMemoryManager(
            data_loader=loader,
            max_physical_batch_size=args.max_physical_batch_size,
            optimizer=optimizer,
        )
    )
    private = optimizer  # whose num_steps counts updates; the loop counts physical batches
    unet, optimizer, loader = accelerator.prepare(unet, optimizer, loader)
    # private: no set_seed: draws taken by position from a known seed tell whose they are.
    while private.num_steps < num_steps:
        for batch in loader:
            # private: the loss is printed nowhere, and there is no gradient to clip.
            accelerator.backward(mean_loss(unet, frozen, batch))
            optimizer.step()
            optimizer.zero_grad()
    memory.close()
    layers = get_peft_model_state_dict(accelerator.unwrap_model(unet))
    StableDiffusionPipeline.save_lora_weights(
        args.output_dir, unet_lora_layers=convert_state_dict_to_diffusers(layers)
    )
    epsilon, adjacency = engine.get_epsilon(args.target_delta), engine.accountant.adjacency
    print(f"epsilon = {epsilon} at delta = {args.target_delta:g}, {adjacency} neighbours")


if __name__ == "__main__":
    main()
