"""Private fine-tuning as a good user of Opacus, PEFT and diffusers writes it, without dpengine.

python -m bench.opacus_finetune --epsilon 8 --num-steps 32 --output DIR

Data, base model, adapter, clip bound, optimizer and schedule are those that `dpengine.finetune` has
by default. Opacus takes each row for a record, and knows no K draws of one; the noise is honest
in both ways around it, so that both claim the epsilon that they have:

average: the K gradients of a record are averaged before Opacus clips; sensitivity C.
rows: each row is clipped by itself; a record then moves the sum by up to K·C, and the noise covers
    that. The sum is divided by K times as many, so the update has the noise of `average` and
    the mean of clipped draws, which is at most as long as C and shorter where draws disagree.
"""

import argparse
import json
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import DDIMScheduler, UNet2DConditionModel
from diffusers.optimization import get_scheduler
from opacus import PrivacyEngine
from opacus.accountants import create_accountant
from opacus.accountants.utils import get_noise_multiplier
from opacus.optimizers import DPOptimizer
from opacus.utils.batch_memory_manager import BatchMemoryManager
from peft import LoraConfig
from safetensors.torch import load_file
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

BASE = Path(__file__).resolve().parent.parent / "models" / "weights" / "digits"
RANK, TARGETS = 4, ["to_q", "to_k", "to_v", "to_out.0"]
DELTA, MAX_GRAD_NORM, DRAWS = 1e-4, 1e-3, 4
SAMPLE_RATE, PHYSICAL_BATCH_SIZE = 1.0, 32
LEARNING_RATE, MOMENTUM = 5 / MAX_GRAD_NORM, 0.5
SAMPLER_STEPS, IMAGES_AT_ONCE = 10, 250
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


class Base(NamedTuple):
    unet: UNet2DConditionModel
    scheduler: DDIMScheduler
    classes: nn.Embedding


def load_base(seed: int) -> Base:
    """The shipped base model, frozen, with a trainable adapter."""
    unet = UNet2DConditionModel.from_pretrained(BASE / "unet").requires_grad_(False)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        unet.add_adapter(LoraConfig(r=RANK, lora_alpha=RANK, target_modules=TARGETS))
    file = BASE / "class_embedding" / "diffusion_pytorch_model.safetensors"
    classes = nn.Embedding.from_pretrained(load_file(file)["embedding.weight"])
    scheduler = DDIMScheduler.from_pretrained(BASE / "scheduler")
    return Base(unet.to(DEVICE).train(), scheduler, classes.to(DEVICE))


def private_digits() -> TensorDataset:
    """The 1,437 digits that are not held out: float32 [N, 1, 8, 8] in [-1, 1], and labels."""
    pixels, labels = load_digits(return_X_y=True)
    pixels, _, labels, _ = train_test_split(
        pixels, labels, test_size=360, stratify=labels, random_state=0
    )
    images = torch.from_numpy(pixels / 8 - 1).float().reshape(-1, 1, 8, 8)
    return TensorDataset(images, torch.from_numpy(labels).long())


def make_private(
    unet: nn.Module,
    dataset: TensorDataset,
    noise_multiplier: float,
    draws: str,
    max_grad_norm: float = MAX_GRAD_NORM,
) -> tuple[nn.Module, DPOptimizer, DataLoader]:
    """noise_multiplier: noise over what one record can move the sum by."""
    params = [param for param in unet.parameters() if param.requires_grad]
    rows_clipped = DRAWS if draws == "rows" else 1
    model, optimizer, loader = PrivacyEngine().make_private(
        module=unet,
        optimizer=torch.optim.SGD(params, lr=LEARNING_RATE, momentum=MOMENTUM),
        # Opacus takes the sampling rate to be one over the length of the loader.
        data_loader=DataLoader(dataset, batch_size=int(SAMPLE_RATE * len(dataset))),
        noise_multiplier=rows_clipped * noise_multiplier,
        max_grad_norm=max_grad_norm,
    )
    optimizer.expected_batch_size *= rows_clipped
    return model, optimizer, loader


def clip_and_step(
    model: nn.Module, optimizer: DPOptimizer, base: Base, draws: str, *rows: Tensor
) -> None:
    """Forward and backward pass of a physical batch, its clipped sum, and a step if it is the last.

    rows: images [N·K, 1, 8, 8], labels, timesteps [N·K], noise as images; K rows side by side.
    """
    images, labels, timesteps, noise = (tensor.to(DEVICE) for tensor in rows)
    noisy = base.scheduler.add_noise(images, noise, timesteps)
    tokens = base.classes(labels)[:, None]
    predicted = model(noisy, timesteps, encoder_hidden_states=tokens).sample
    F.mse_loss(predicted, base.scheduler.get_velocity(images, noise, timesteps)).backward()
    if draws == "average":
        for param in optimizer.params:
            of_rows = param.grad_sample
            param.grad_sample = of_rows.view(-1, DRAWS, *param.shape).mean(1)
    optimizer.step()


def train(base: Base, noise_multiplier: float, num_steps: int, draws: str) -> None:
    model, optimizer, loader = make_private(base.unet, private_digits(), noise_multiplier, draws)
    schedule = get_scheduler("linear", optimizer, num_warmup_steps=0, num_training_steps=num_steps)
    with BatchMemoryManager(
        data_loader=loader, max_physical_batch_size=PHYSICAL_BATCH_SIZE, optimizer=optimizer
    ) as physical:
        for _ in range(num_steps):  # a pass over the loader is one batch at this sampling rate
            for images, labels in physical:
                images, labels = (t.repeat_interleave(DRAWS, 0) for t in (images, labels))
                timesteps = torch.randint(base.scheduler.config.num_train_timesteps, labels.shape)
                rows = images, labels, timesteps, torch.randn_like(images)
                clip_and_step(model, optimizer, base, draws, *rows)
                optimizer.zero_grad()
            schedule.step()
    model.to_standard_module()


@torch.no_grad()
def sample(base: Base, num: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Images uint8 [num, 8, 8], each class equally often, and labels."""
    base.unet.eval()
    generator = torch.Generator().manual_seed(seed)
    base.scheduler.set_timesteps(SAMPLER_STEPS)
    labels, images = torch.arange(num) % 10, []
    for chunk in labels.split(IMAGES_AT_ONCE):
        tokens = base.classes(chunk.to(DEVICE))[:, None]
        x = torch.randn(len(chunk), 1, 8, 8, generator=generator).to(DEVICE)
        for t in base.scheduler.timesteps:
            predicted = base.unet(x, t, encoder_hidden_states=tokens).sample
            x = base.scheduler.step(predicted, t, x).prev_sample
        images.append(((x[:, 0].clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8))
    return torch.cat(images).cpu().numpy(), labels.numpy()


def main(args: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--epsilon", type=float, default=8.0)
    parser.add_argument("--num-steps", type=int, default=32)
    parser.add_argument("--num-synthetic", type=int, default=2000)
    parser.add_argument("--draws", choices=("average", "rows"), default="average")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, required=True)
    options = parser.parse_args(args)
    options.output.mkdir(parents=True)
    accountant = create_accountant("prv")
    noise_multiplier = get_noise_multiplier(
        target_epsilon=options.epsilon,
        target_delta=DELTA,
        sample_rate=SAMPLE_RATE,
        steps=options.num_steps,
        accountant="prv",
    )
    base = load_base(options.seed)
    train(base, noise_multiplier, options.num_steps, options.draws)
    base.unet.save_lora_adapter(options.output)
    images, labels = sample(base, options.num_synthetic, options.seed)
    np.savez_compressed(options.output / "synthetic.npz", images=images, labels=labels)
    # Not the engine's own account, which would be of rows.
    accountant.history = [(noise_multiplier, SAMPLE_RATE, options.num_steps)]
    claim = {"epsilon": accountant.get_epsilon(DELTA), "noise_multiplier": noise_multiplier}
    (options.output / "claim.json").write_text(json.dumps(claim))


if __name__ == "__main__":
    main()
