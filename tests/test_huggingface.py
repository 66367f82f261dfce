"""The examples of docs/examples: diffusers' LoRA script and transformers' Trainer, privately."""

import copy
import json
import os
import re
import runpy
import subprocess
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState, GradientState
from diffusers import AutoencoderKL, DDPMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from peft import LoraConfig, get_peft_model
from PIL import Image
from torch import nn
from torch.utils.data import Dataset
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    TrainingArguments,
)

from dpengine import PrivacyError

ROOT = Path(__file__).parent.parent
EXAMPLES = ROOT / "docs" / "examples"
TARGETS = re.compile(r"attn\d\.(to_q|to_k|to_v|to_out\.0)$")


@pytest.fixture(autouse=True)
def fresh_accelerate(no_shared_cache, tmp_path_factory, monkeypatch):
    """Each test has an accelerate of its own; all have one cache of calibrations."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.getbasetemp() / "huggingface"))
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def example(name: str) -> SimpleNamespace:
    return SimpleNamespace(**runpy.run_path(str(EXAMPLES / name), run_name="example"))


# ---- docs/examples/train_text_to_image_lora.py


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    """A text-to-image model of images of 16x16, random weights, in the layout of the hub."""
    folder = tmp_path_factory.mktemp("base")
    letters = [chr(number) for number in range(ord("a"), ord("z") + 1)]
    words = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({word: n for n, word in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    tokenizer = CLIPTokenizer(
        str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=8
    )
    tokenizer.save_pretrained(folder / "tokenizer")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        text_config = CLIPTextConfig(
            vocab_size=len(words),
            hidden_size=8,
            intermediate_size=8,
            num_hidden_layers=1,
            num_attention_heads=2,
            max_position_embeddings=8,
            bos_token_id=len(words) - 2,
            eos_token_id=len(words) - 1,
            pad_token_id=len(words) - 1,
        )
        CLIPTextModel(text_config).save_pretrained(folder / "text_encoder")
        blocks = {"block_out_channels": (8, 8), "layers_per_block": 1, "norm_num_groups": 4}
        AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            **blocks,
        ).save_pretrained(folder / "vae")
        UNet2DConditionModel(
            sample_size=8,
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
            cross_attention_dim=8,
            attention_head_dim=4,
            **blocks,
        ).save_pretrained(folder / "unet")
    DDPMScheduler(steps_offset=1, clip_sample=False).save_pretrained(folder / "scheduler")
    return folder


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    """A dozen images of several sizes and modes, with captions."""
    folder, random = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    lines = []
    for number in range(12):
        shape = (16 + number, 20, 3) if number % 2 else (16, 16 + number)
        Image.fromarray(random.integers(0, 256, shape, np.uint8)).save(folder / f"{number}.png")
        lines.append(json.dumps({"file_name": f"{number}.png", "text": "a" * (number + 1)}))
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    return folder


def command(base: Path, images: Path, output: Path, *more: str) -> list[str]:
    return (
        f"--pretrained_model_name_or_path {base} --train_data_dir {images} --output_dir {output} "
        "--resolution 16 --rank 2 --train_batch_size 4 --num_train_epochs 2 --learning_rate 0.01 "
        "--target_epsilon 8 --target_delta 1e-3"
    ).split() + list(more)


def record(monkeypatch, main, name: str) -> list:
    """What calls of ``name`` in the script that ``main`` is of return."""
    made, real = [], main.__globals__[name]

    def recorded(*args, **kwargs):
        made.append(real(*args, **kwargs))
        return made[-1]

    monkeypatch.setitem(main.__globals__, name, recorded)
    return made


def start_of(base: Path) -> UNet2DConditionModel:
    return UNet2DConditionModel.from_pretrained(base, subfolder="unet")


@pytest.mark.parametrize(
    "options",
    [
        pytest.param("", marks=pytest.mark.slow),
        pytest.param("--max_physical_batch_size 2", marks=pytest.mark.slow),
        "--gradient_checkpointing",
        "--max_train_steps 5 --max_physical_batch_size 3",
        "--mixed_precision bf16",
        "--dataloader_num_workers 2 --max_physical_batch_size 2",
        pytest.param(
            "--sample_rate 0.25 --lr_scheduler linear --max_physical_batch_size 1",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_the_diffusers_script_trains_every_tensor_at_the_planned_epsilon(
    base, images, tmp_path, monkeypatch, capsys, options
):
    main = example("train_text_to_image_lora.py").main
    engines = record(monkeypatch, main, "PrivacyEngine")
    schedulers = record(monkeypatch, main, "get_scheduler")
    unets, real = [], main.__globals__["load_unet"]

    def load_unet(*args):
        unet = real(*args)
        unets.append({name: p.detach().clone() for name, p in unet.named_parameters()})
        return unet

    monkeypatch.setitem(main.__globals__, "load_unet", load_unet)
    main(command(base, images, tmp_path, *options.split()))

    (engine,), (scheduler,), (start,) = engines, schedulers, unets
    printed = float(re.search(r"epsilon = (\S+) at delta", capsys.readouterr().out)[1])
    assert printed == engine.get_epsilon(1e-3) and 7 < printed <= 8
    n_steps = 5 if "max_train_steps" in options else 2 * (4 if "sample_rate" in options else 3)
    assert len(engine.accountant) == n_steps == scheduler.last_epoch
    loaded = start_of(base)
    targets = [name for name, _ in loaded.named_modules() if TARGETS.search(name)]
    loaded.load_lora_adapter(
        tmp_path, prefix="unet", weight_name="pytorch_lora_weights.safetensors"
    )
    tensors = {n.replace("default_0", "default"): p for n, p in loaded.named_parameters()}
    trained = {name: p for name, p in tensors.items() if "lora" in name}
    assert len(trained) == 2 * len(targets) == 2 * 4 * 8
    for name, param in trained.items():
        assert param.isfinite().all() and (param != start[name]).any(), name


def test_the_loss_of_the_diffusers_script_is_a_sum_of_one_for_each_row(monkeypatch):
    """What one row adds does not change with another row, the draws being the same."""
    mean_loss, draws = example("train_text_to_image_lora.py").mean_loss, torch.Generator()

    def normal_like(x: torch.Tensor) -> torch.Tensor:
        return torch.randn(x.shape, generator=draws)

    def integers(low: int, high: int, shape: tuple, device: torch.device) -> torch.Tensor:
        return torch.randint(low, high, shape, generator=draws)

    monkeypatch.setitem(mean_loss.__globals__, "secure_normal_like", normal_like)
    monkeypatch.setitem(mean_loss.__globals__, "secure_integers", integers)
    images = torch.randn(2, 2, 3, 4, 4, generator=torch.Generator().manual_seed(1))
    frozen = SimpleNamespace(
        vae=SimpleNamespace(
            dtype=torch.float32,
            config=SimpleNamespace(scaling_factor=1.0),
            encode=lambda x: SimpleNamespace(latent_dist=SimpleNamespace(mean=x, std=0 * x)),
        ),
        text_encoder=lambda tokens, return_dict: (tokens,),
        noise_scheduler=DDPMScheduler(num_train_timesteps=100),
    )

    def loss(first: int, second: int) -> float:
        pixels = torch.stack([images[0, first], images[1, second]])
        batch = {"pixel_values": pixels, "input_ids": torch.zeros(2, 8)}
        draws.manual_seed(0)
        return mean_loss(lambda noisy, *_, return_dict: (noisy,), frozen, batch).item()

    added = [loss(first, 1) - loss(first, 0) for first in (0, 1)]
    assert abs(added[0]) > 1e-2
    assert added[0] == pytest.approx(added[1], abs=8 * torch.finfo().eps * loss(0, 0))


def test_images_stand_upright_and_no_caption_is_cut(base, tmp_path):
    """A camera's EXIF orientation; a caption with each character that ends a line somewhere."""
    pixels = np.zeros((16, 16, 3), np.uint8)
    pixels[:8] = 255
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by a quarter: the upper half is shown on the right
    Image.fromarray(pixels).save(tmp_path / "0.png", exif=exif)
    texts = ["a\u2028b", "a\u2029b", "a\x85b", "a\x0bb", "a\x1cb", "a\nb", ""]
    lines = [json.dumps({"file_name": "0.png", "text": text}, ensure_ascii=False) for text in texts]
    (tmp_path / "metadata.jsonl").write_text("\n".join(lines) + "\n\n", encoding="utf-8")
    tokenizer = CLIPTokenizer.from_pretrained(base, subfolder="tokenizer")
    data = example("train_text_to_image_lora.py").CaptionedImages(tmp_path, tokenizer, 16)
    assert len(data) == len(texts) and {len(record["input_ids"]) for record in data} == {8}
    shown = data[0]["pixel_values"]
    assert (shown[:, :, 8:] == 1).all() and (shown[:, :, :8] == -1).all()


def test_the_pipeline_loads_what_the_diffusers_script_wrote(base, images, tmp_path, capsys):
    """And what the script prints of the run is its guarantee."""
    example("train_text_to_image_lora.py").main(command(base, images, tmp_path))
    said = r"epsilon = 7\.\d+ at delta = 0\.001, zero-out neighbours\n"
    assert re.fullmatch(said, capsys.readouterr().out)
    parts = {
        "text_encoder": CLIPTextModel.from_pretrained(base, subfolder="text_encoder"),
        "tokenizer": CLIPTokenizer.from_pretrained(base, subfolder="tokenizer"),
        "vae": AutoencoderKL.from_pretrained(base, subfolder="vae"),
        "unet": start_of(base),
        "scheduler": DDPMScheduler.from_pretrained(base, subfolder="scheduler"),
    }
    pipeline = StableDiffusionPipeline(
        **parts, safety_checker=None, feature_extractor=None, requires_safety_checker=False
    )
    pipeline.load_lora_weights(tmp_path)
    moved = [p for n, p in pipeline.unet.named_parameters() if "lora_B" in n]
    assert len(moved) == 4 * 8 and all(param.any() for param in moved)


@pytest.mark.slow
def test_two_processes_are_refused(base, images, tmp_path):
    script = str(EXAMPLES / "train_text_to_image_lora.py")
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    run = subprocess.run(
        [*launch, script, *command(base, images, tmp_path)],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert run.returncode != 0 and not list(tmp_path.iterdir())
    assert "private training runs in one process, got a world size of 2" in run.stderr


# ---- docs/examples/trainer.py


class Sentences(Dataset):
    """Of 3 to 7 tokens, padded to 8."""

    def __len__(self) -> int:
        return 12

    def __getitem__(self, number: int) -> dict[str, torch.Tensor]:
        tokens, is_token = torch.arange(1, 9) * (number + 1) % 16, torch.arange(8) < 3 + number % 5
        labels = tokens.where(is_token, -100)
        return {"input_ids": tokens, "attention_mask": is_token.long(), "labels": labels}


@pytest.fixture
def language_model() -> nn.Module:
    config = LlamaConfig(
        vocab_size=16,
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=8,
    )
    lora = LoraConfig(r=2, target_modules=["q_proj", "v_proj"])
    with warnings.catch_warnings():  # PEFT asks transformers by a name that is going away
        warnings.simplefilter("ignore", FutureWarning)
        return get_peft_model(LlamaForCausalLM(config), lora)


def make_trainer(model: nn.Module, folder: Path, **more):
    arguments = TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=4,
        num_train_epochs=2,
        learning_rate=0.05,
        max_grad_norm=0.1,
        eval_strategy="steps",
        eval_steps=1,
        logging_steps=1,
        save_strategy="epoch",
        use_cpu=True,
        disable_tqdm=True,
        report_to=[],
        **more,
    )
    return example("trainer.py").private_trainer(
        model,
        arguments,
        Sentences(),
        target_epsilon=8.0,
        target_delta=1e-3,
        sample_rate=0.25,
        eval_dataset=Sentences(),
    )


def test_the_trainer_trains_and_evaluates_at_the_planned_epsilon(language_model, tmp_path):
    trainer, engine = make_trainer(language_model, tmp_path)
    trained = {n: p for n, p in language_model.named_parameters() if p.requires_grad}
    start = copy.deepcopy(trained)
    result = trainer.train()
    assert trainer.model is language_model
    assert all((param != start[name]).any() for name, param in trained.items()) and trained
    assert 7 < engine.get_epsilon(1e-3) <= 8 and len(engine.accountant) == result.global_step == 8
    evaluated = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
    assert len(set(evaluated)) == 8


def test_the_trainer_logs_nothing_of_its_records(language_model, tmp_path, capsys):
    """Losses, gradient norms and operations are 0; samples per second are those of the plan."""
    trainer, _ = make_trainer(language_model, tmp_path)
    result = trainer.train()
    saved = json.loads((tmp_path / "checkpoint-8" / "trainer_state.json").read_text())
    for history in (trainer.state.log_history, saved["log_history"]):
        private = {"loss", "grad_norm", "train_loss", "total_flos"}
        assert {entry[name] for entry in history for name in private & entry.keys()} == {0}
    assert saved["total_flos"] == result.training_loss == 0
    metrics = result.metrics
    n_samples = metrics["train_samples_per_second"] / metrics["train_steps_per_second"] * 8
    assert n_samples == pytest.approx(4 * 4 * 2, rel=0.01)  # not 2 epochs of 12 records


def test_the_trainers_loss_weighs_no_record_by_the_length_of_another(language_model, tmp_path):
    trainer, _ = make_trainer(language_model, tmp_path)
    records = [Sentences()[number] for number in (0, 4, 2)]
    language_model.eval()

    def loss(rows: list[dict]) -> float:
        batch = {name: torch.stack([row[name] for row in rows]) for name in rows[0]}
        return trainer.compute_loss(language_model, batch, num_items_in_batch=1000).item()

    alone = []
    for record in records:
        n_tokens = int(record["attention_mask"].sum())
        tokens = record["input_ids"][None, :n_tokens]
        # The model's own loss of one sentence without padding: the mean over its tokens.
        alone.append(language_model(input_ids=tokens, labels=tokens).loss.item())
    assert loss(records) == pytest.approx(np.mean(alone), rel=1e-5)


def test_the_trainer_refuses_sentences_as_long_as_the_longest_of_a_batch(language_model, tmp_path):
    def to_the_longest(records: list[dict]) -> dict[str, torch.Tensor]:
        longest = max(int(record["attention_mask"].sum()) for record in records)
        return {name: torch.stack([r[name][:longest] for r in records]) for name in records[0]}

    args = make_trainer(language_model, tmp_path)[0].args
    more = {"data_collator": to_the_longest, "eval_dataset": Sentences(), "sample_rate": 1.0}
    trainer, _ = example("trainer.py").private_trainer(
        language_model, args, Sentences(), target_epsilon=8.0, target_delta=1e-3, **more
    )
    with pytest.raises(PrivacyError, match="the length of its longest record"):
        trainer.train()


@pytest.mark.parametrize("max_steps", [3, 10])
def test_the_trainer_spends_the_target_on_a_number_of_steps(language_model, tmp_path, max_steps):
    trainer, engine = make_trainer(language_model, tmp_path, max_steps=max_steps)
    assert trainer.train().global_step == len(engine.accountant) == max_steps
    assert 7 < engine.get_epsilon(1e-3) <= 8


def test_the_trainer_refuses_gradient_accumulation_and_resuming(language_model, tmp_path):
    trainer, _ = make_trainer(language_model, tmp_path, gradient_accumulation_steps=2)
    with pytest.raises(PrivacyError, match="every batch must be used, once"):
        trainer.train()
    with pytest.raises(ValueError, match="charged"):
        trainer.train(resume_from_checkpoint=True)


def test_the_trainer_does_not_train_longer_than_planned(language_model, tmp_path):
    trainer, engine = make_trainer(language_model, tmp_path)
    trainer.train()
    with pytest.raises(PrivacyError, match="all 8 planned draws are charged"):
        trainer.train()
    assert engine.get_epsilon(1e-3) <= 8
