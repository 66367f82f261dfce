"""What a user may choose, in the groups of the command line. Comments become its help."""

import dataclasses
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from .errors import not_negative, positive, positive_int, probability
from .mechanism.plan import Adjacency, check_delta
from .option_types import UserPath as UserPath
from .option_types import parse_bytes as parse_bytes

TimeLaw = Literal["uniform", "logit-normal", "edm"]

DIGITS = "digits"
"""Name of the embedded data set: scikit-learn's 8x8 handwritten digits."""

_LARGEST_RANK = 4096
"""Above the width of any layer that has a smaller adapter than its own weights."""

_SMALLEST_RATE = 1e-12
"""Coins are words of 64 bits, and the noise is divided by the expected batch size."""

_LARGEST_ALPHA = 1e12

MOST_IMAGES = 10**7
"""Images drawn from released weights at once; they are held in memory."""

_SMALLEST_BOUND = 1e-12
"""Clip bounds are far from the ends of float32, in which weights are updated."""

_RESUMED = ("resume", "num_synthetic", "sampler_steps")
"""Options of the output that may change from one attempt to the next, as no training sees them."""


@dataclass(frozen=True)
class DataSettings:
    """The private images."""

    data: UserPath = DIGITS
    """`digits` (embedded), an .npz file, or a folder with a sub-folder of images for each class."""
    prompt: str | None = None
    """Public prompt where the base follows prompts, such as "a photo of {class}": of every image,
    or, in a folder with captions, of those that are drawn."""
    class_names: tuple[str, ...] = ()
    """Public names that stand for {class}, in the order of the labels. Default: the sub-folders."""
    image_size: int | None = None
    """Pixels of a side that images are cropped and resized to. Default: what the base draws."""

    def check(self) -> None:
        """Raise ValueError for a number outside its range, or an empty text."""
        if self.image_size is not None:
            positive_int(image_size=self.image_size)
        if self.prompt is not None and not (self.prompt.strip() and self.prompt.isprintable()):
            raise ValueError(
                "prompt must say something, in printable characters and one line, such as 'a photo "
                f"of {{class}}', got {self.prompt!r}"
            )
        if len(set(self.class_names)) != len(self.class_names) or "" in self.class_names:
            raise ValueError(
                f"class_names must be names, none of them twice, got {self.class_names}"
            )
        if self.class_names and "{class}" not in (self.prompt or ""):
            raise ValueError(
                "class_names stand for {class} in the prompt; give a prompt with {class}, or leave "
                "them out"
            )

    @property
    def texts(self) -> tuple[str, ...]:
        """The prompt of each class; of all images, where it names none."""
        if self.prompt is None or "{class}" not in self.prompt:
            return () if self.prompt is None else (self.prompt,)
        return tuple(self.prompt.replace("{class}", name) for name in self.class_names)


@dataclass(frozen=True)
class ModelSettings:
    """The public base model and its adapter."""

    base: UserPath = "default"
    """`default` (embedded), or the folder or hub id of a diffusers pipeline."""
    rank: int = 4
    """Rank of each LoRA adapter."""
    alpha: float = 4.0
    """LoRA alpha; updates are scaled by alpha / rank."""
    target_modules: tuple[str, ...] | None = None
    """Names of the linear layers and convolutions that get an adapter. Default: those of the
    attention, as diffusers' own scripts choose them for the base."""


@dataclass(frozen=True)
class PrivacySettings:
    """What is promised, and the mechanism: the guarantee rests on this group alone."""

    epsilon: float = 8.0
    """Target epsilon, an upper bound; `inf` trains without noise and is not private."""
    delta: float = 1e-4
    """Target delta, below 1 / dataset size."""
    public_dataset_size: int | None = None
    """Public number of records, which need not be the true one. Without it, the true number is
    public."""
    adjacency: Adjacency | None = None
    """What may differ between neighbours: one record more or less (add-remove), one that then
    contributes nothing (zero-out), or one replaced by any other (replace-one: more noise). Default:
    add-remove with a public dataset size, zero-out without."""
    sampling_rate: float = 1.0
    """Probability with which each record enters a step."""
    num_steps: int = 32
    """Noisy updates of the weights, all attempts together."""
    max_grad_norm: float = 0.001
    """Bound of one record's contribution: L2 norm of its gradient, in units of the loss."""
    draws_per_record: int = 4
    """Noise and timestep draws of a record, averaged before its norm is taken."""
    rows_per_unit: int = 1
    """Where the data names a person for each image: images that each person brings to a step."""
    clipping: Literal["flat", "per-layer", "automatic", "adaptive"] = "flat"
    """How a record is brought within the bound; the noise covers the bound in each case."""
    gamma: float = 0.01
    """Automatic clipping: added to the norm that a record is divided by."""
    clip_quantile: float = 0.5
    """Adaptive clipping: share of the records that the bound should not touch."""
    clip_learning_rate: float = 0.2
    """Adaptive clipping: how fast the bound moves; 0 keeps it and shows the noised share of records
    within it, at the cost of a little more noise."""

    def check(self) -> None:
        """Raise ValueError for a number outside its range."""
        if not self.epsilon > 0:
            raise ValueError(f"epsilon must be > 0, or inf for no privacy, got {self.epsilon}")
        if not 0 < self.delta < 1:
            raise ValueError(f"delta must lie between 0 and 1, got {self.delta}")
        if self.public_dataset_size is not None:
            positive_int(public_dataset_size=self.public_dataset_size)
            check_delta(self.delta, self.public_dataset_size)
        probability(sampling_rate=self.sampling_rate)
        if self.sampling_rate < _SMALLEST_RATE:
            raise ValueError(
                f"sampling_rate must be at least {_SMALLEST_RATE:g}, got {self.sampling_rate}"
            )
        if not _SMALLEST_BOUND <= self.max_grad_norm <= 1 / _SMALLEST_BOUND:
            raise ValueError(
                f"max_grad_norm must lie between {_SMALLEST_BOUND:g} and {1 / _SMALLEST_BOUND:g}, "
                f"got {self.max_grad_norm}"
            )
        positive_int(
            num_steps=self.num_steps,
            draws_per_record=self.draws_per_record,
            rows_per_unit=self.rows_per_unit,
        )
        positive(gamma=self.gamma)
        not_negative(clip_learning_rate=self.clip_learning_rate)
        if self.clip_learning_rate > 10:
            raise ValueError(
                f"clip_learning_rate must be at most 10, got {self.clip_learning_rate}"
            )
        probability(clip_quantile=self.clip_quantile)
        if self.adjacency == "add-remove" and self.public_dataset_size is None:
            raise ValueError(
                "adjacency cannot be add-remove where the true number of records is public: give "
                "public_dataset_size, or leave adjacency out"
            )
        if self.adjacency == "zero-out" and self.public_dataset_size is not None:
            raise ValueError(
                "adjacency is zero-out where the true number of records is public: leave "
                "public_dataset_size out, or adjacency, which is then add-remove"
            )

    @property
    def neighbours(self) -> Adjacency:
        """The adjacency that holds: the one chosen, or what the public size leaves."""
        if self.adjacency is not None:
            return self.adjacency
        return "zero-out" if self.public_dataset_size is None else "add-remove"


@dataclass(frozen=True)
class TrainingSettings:
    """How noisy gradients become weights. No field of this group can change epsilon."""

    optimizer: Literal["sgd", "adamw", "adamw-bc", "lamb"] = "sgd"
    """Update rule; adamw-bc corrects the second moment for the noise."""
    learning_rate: float | None = None
    """Step size at the start. Default: 5 / max-grad-norm for sgd, 0.01 for the others."""
    time_law: TimeLaw | None = None
    """How the times of a record's draws are spread. Default: as the base's family is trained."""
    loss_weights: Literal["none", "min-snr"] = "none"
    """Weights of the times in the loss."""
    snr_gamma: float = 5.0
    """Signal-to-noise ratio above which min-snr lowers the weight."""
    gradient_filter: Literal["none", "laplacian", "low-pass"] = "none"
    """What is done to the noised gradient: smoothing over neighbouring values, or over steps."""
    filter_strength: float = 0.5
    """Strength of the Laplacian smoothing, or decay per step of the low-pass filter."""
    lr_schedule: Literal["constant", "linear", "cosine"] = "linear"
    """How the step size falls over the planned steps."""
    weight_decay: float = 0.0
    """Decoupled weight decay of AdamW and LAMB."""
    momentum: float = 0.5
    """Momentum of SGD."""
    ema_decay: float = 0.0
    """Decay per step of the average of the weights that is released; 0 releases the last ones."""
    seed: int = 0
    """Seed of public things only: initial weights and samples. Private draws have none."""

    def check(self) -> None:
        """Raise ValueError for a number outside its range."""
        if self.learning_rate is not None:
            positive(learning_rate=self.learning_rate)
        if not 0 <= self.ema_decay < 1:
            raise ValueError(f"ema_decay must be at least 0 and below 1, got {self.ema_decay}")
        if not 0 <= self.momentum < 1:
            raise ValueError(f"momentum must be at least 0 and below 1, got {self.momentum}")
        positive(snr_gamma=self.snr_gamma)
        not_negative(weight_decay=self.weight_decay, filter_strength=self.filter_strength)
        if self.gradient_filter == "low-pass" and self.filter_strength >= 1:
            raise ValueError(
                "filter_strength must be below 1 for the low-pass filter, got "
                f"{self.filter_strength}"
            )
        if not 0 <= self.seed < 2**63:
            raise ValueError(f"seed must lie between 0 and 2**63 - 1, got {self.seed}")


@dataclass(frozen=True)
class PerformanceSettings:
    """How fast and in how much memory. No field of this group can change epsilon."""

    physical_batch_size: int = 32
    """Records in one forward pass, a person counting as one."""
    max_memory: str | None = None
    """Memory for the tensors of forward pass, backward pass and clipping, such as 8GB; the physical
    batch is then the largest that fits, found by dry runs on synthetic images."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to train; auto takes a GPU where there is one."""
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Type of the frozen base and of its computations; the adapter stays float32."""
    per_record_grads: Literal["fp32", "bf16"] = "fp32"
    """Type in which gradients are kept until they are clipped."""
    gradient_checkpointing: bool = False
    """Compute activations twice rather than keep them."""
    compile: Literal["eager", "inductor", "cuda-graph"] = "eager"
    """Record the forward and backward pass once and run the recording."""

    def check(self) -> None:
        """Raise ValueError for a number outside its range."""
        positive_int(physical_batch_size=self.physical_batch_size)
        if self.max_memory is not None:
            parse_bytes(self.max_memory)


@dataclass(frozen=True)
class OutputSettings:
    """What is written."""

    output: UserPath | None = None
    """New folder for the results. Default: runs/NAME-001, or the next free number."""
    resume: UserPath | None = None
    """Folder of an unfinished run to go on with, by its own settings. Beside it, performance
    options, num-synthetic and sampler-steps hold for this attempt; all others are refused."""
    num_synthetic: int = 2000
    """Images drawn from the released weights into synthetic.npz."""
    sampler_steps: int = 10
    """Denoising steps for each image drawn."""

    def check(self) -> None:
        """Raise ValueError for a number outside its range."""
        positive_int(num_synthetic=self.num_synthetic, sampler_steps=self.sampler_steps)
        if self.num_synthetic > MOST_IMAGES:
            raise ValueError(
                f"num_synthetic must be at most {MOST_IMAGES:,}, got {self.num_synthetic}; draw "
                "more by python -m dpengine.generate, with other seeds"
            )


@dataclass(frozen=True)
class Settings:
    """Fine-tune a diffusion model on private images, with a proof of differential privacy."""

    data: DataSettings = field(default_factory=DataSettings)
    model: ModelSettings = field(default_factory=ModelSettings)
    privacy: PrivacySettings = field(default_factory=PrivacySettings)
    training: TrainingSettings = field(default_factory=TrainingSettings)
    performance: PerformanceSettings = field(default_factory=PerformanceSettings)
    output: OutputSettings = field(default_factory=OutputSettings)

    def check(self) -> None:
        """Raise ValueError for a number outside its range, whatever the data."""
        positive_int(rank=self.model.rank)
        if self.model.rank > _LARGEST_RANK:
            raise ValueError(f"rank must be at most {_LARGEST_RANK}, got {self.model.rank}")
        if self.data.data != DIGITS and not Path(self.data.data).exists():
            raise ValueError(
                f"data must be {DIGITS!r}, an .npz file or a folder of images, got "
                f"{self.data.data!r}, which does not exist"
            )
        positive(alpha=self.model.alpha)
        if not str(self.model.base).isprintable():
            raise ValueError(
                "base must be a name of printable characters, as the model card repeats it, got "
                f"{self.model.base!r}; rename the folder"
            )
        if self.model.alpha > _LARGEST_ALPHA:
            raise ValueError(f"alpha must be at most {_LARGEST_ALPHA:g}, got {self.model.alpha}")
        if self.model.target_modules == ():
            raise ValueError("target_modules must name at least one layer, such as to_q")
        for group in (self.data, self.privacy, self.training, self.performance, self.output):
            group.check()

    def to_dict(self) -> dict[str, Any]:
        """The settings as JSON types, an infinite epsilon as the string `inf`."""
        content = dataclasses.asdict(self)
        if math.isinf(self.privacy.epsilon):
            content["privacy"]["epsilon"] = "inf"
        return content

    def with_absolute_paths(self) -> "Settings":
        """The same with the paths of data and base that hold wherever the run is resumed."""
        data, model = self.data, self.model
        if data.data != DIGITS:
            data = dataclasses.replace(data, data=str(Path(data.data).absolute()))
        if model.base != "default" and Path(model.base).is_dir():
            model = dataclasses.replace(model, base=str(Path(model.base).absolute()))
        return dataclasses.replace(self, data=data, model=model)

    def resumed(self, asked: "Settings") -> "Settings":
        """What one more attempt of a run that began with these settings goes by: ``asked``.

        Raises ValueError where that differs in anything that may enter the guarantee, or in which
        weights come out, and names it.
        """
        own, asked = self.to_dict(), asked.with_absolute_paths()
        fixed = [
            f"--{name.replace('_', '-')}"
            for group, options in asked.to_dict().items()
            for name, value in options.items()
            if group != "performance" and name not in _RESUMED and value != own[group][name]
        ]
        if fixed:
            raise ValueError(
                f"--resume keeps what the run began with: leave out {', '.join(fixed)}, or start a "
                "new run; only performance options, --num-synthetic and --sampler-steps may change"
            )
        performance = asked.performance
        resized = performance.physical_batch_size != self.performance.physical_batch_size
        if resized and performance.max_memory == self.performance.max_memory:
            # The size given now, not the one that the run had found by its memory.
            performance = dataclasses.replace(performance, max_memory=None)
        performance.check()
        asked.output.check()
        return dataclasses.replace(asked, performance=performance)

    @classmethod
    def from_dict(cls, content: dict[str, Any]) -> "Settings":
        """Inverse of ``to_dict``. Raises TypeError or KeyError for other content."""
        data = content["data"]
        data = data | {"class_names": tuple(data.get("class_names", ()))}
        targets = content["model"]["target_modules"]
        targets = None if targets is None else tuple(targets)
        model = content["model"] | {"target_modules": targets}
        privacy = content["privacy"] | {"epsilon": float(content["privacy"]["epsilon"])}
        return cls(
            data=DataSettings(**data),
            model=ModelSettings(**model),
            privacy=PrivacySettings(**privacy),
            training=TrainingSettings(**content["training"]),
            performance=PerformanceSettings(**content["performance"]),
            output=OutputSettings(**content["output"]),
        )
