"""Fine-tune a language model's LoRA adapter with the Trainer of transformers, privately.

The model stays the caller's own: nothing wraps it, and the Trainer saves and evaluates it as ever.
``private_trainer`` is to be called in place of ``Trainer``.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, Dataset
from transformers import Trainer, TrainingArguments

from dpengine import PrivacyEngine


class PrivateTrainer(Trainer):
    """A Trainer on the loader of ``make_private``, with a loss that keeps records apart."""

    def __init__(self, *, private_loader: DataLoader, **arguments: Any) -> None:
        super().__init__(**arguments)
        self._private_loader = private_loader

    def get_train_dataloader(self) -> DataLoader:
        return self.accelerator.prepare(self._private_loader)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """The mean over rows of each row's mean over its own tokens; labels of -100 do not count.

        The Trainer's own loss is a sum over ``num_items_in_batch``, the number of tokens of the
        batch: there the length of one record weighs the gradients of all others. The model must not
        see the labels, or it computes that loss as well.
        """
        inputs = dict(inputs)
        labels = inputs.pop("labels")[:, 1:]
        outputs = model(**inputs)
        logits = outputs.logits[:, :-1].float().transpose(1, 2)
        losses = cross_entropy(logits, labels, reduction="none")  # 0 where the label is -100
        n_tokens = (labels != -100).sum(1).clamp(min=1)
        loss = (losses.sum(1) / n_tokens).mean()
        return (loss, outputs) if return_outputs else loss

    def training_step(self, *arguments: Any, **keywords: Any) -> Tensor:
        """A step whose loss does not reach the log, the progress bar or trainer_state.json."""
        return torch.zeros_like(super().training_step(*arguments, **keywords))

    def num_examples(self, dataloader: DataLoader) -> int:
        """What the log's samples per second are made from: a public number for training data."""
        if self.is_in_train:
            return len(dataloader) * self.args.per_device_train_batch_size
        return super().num_examples(dataloader)


def private_trainer(
    model: nn.Module,
    args: TrainingArguments,
    train_dataset: Dataset,
    *,
    target_epsilon: float,
    target_delta: float,
    sample_rate: float | None = None,
    data_collator: Callable[[list], Any] | None = None,
    **arguments: Any,
) -> tuple[PrivateTrainer, PrivacyEngine]:
    """A Trainer whose ``train()`` spends at most ``target_epsilon``, and what counts it.

    ``args.per_device_train_batch_size`` is the expected batch size, ``args.max_grad_norm`` the
    bound of one record. Other ``arguments`` are the Trainer's, as eval_dataset.
    """
    if args.gradient_accumulation_steps > 1 or args.fp16 or args.max_steps > 0:
        raise ValueError(
            "gradient_accumulation_steps must be 1, fp16 False and max_steps unset: give a larger "
            "batch size, bf16=True, and num_train_epochs, which the noise is planned for"
        )
    model = model.to(args.device)
    trained = [param for param in model.parameters() if param.requires_grad]
    engine = PrivacyEngine()
    model, optimizer, loader = engine.make_private_with_epsilon(
        module=model,
        optimizer=torch.optim.AdamW(trained, lr=args.learning_rate, weight_decay=args.weight_decay),
        data_loader=DataLoader(
            train_dataset,
            batch_size=args.per_device_train_batch_size,
            collate_fn=data_collator,
            num_workers=args.dataloader_num_workers,
        ),
        target_epsilon=target_epsilon,
        target_delta=target_delta,
        epochs=math.ceil(args.num_train_epochs),
        max_grad_norm=args.max_grad_norm,
        sample_rate=sample_rate,
    )
    trainer = PrivateTrainer(
        private_loader=loader,
        model=model,
        args=args,
        train_dataset=train_dataset,
        data_collator=data_collator,
        optimizers=(optimizer, None),
        **arguments,
    )
    return trainer, engine
