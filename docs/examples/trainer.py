"""Fine-tune a language model with the Trainer of transformers, privately; nothing wraps it."""

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, Dataset
from transformers import Trainer, TrainingArguments

from dpengine import PrivacyEngine


class PrivateTrainer(Trainer):
    """A Trainer on the loader of ``make_private`` that keeps records apart, and to itself."""

    def __init__(self, *, private_loader: DataLoader, **arguments: Any) -> None:
        super().__init__(**arguments)
        self._private_loader = private_loader

    def train(self, resume_from_checkpoint: None = None, **arguments: Any) -> Any:
        if resume_from_checkpoint:
            raise ValueError("a Trainer's checkpoint does not tell what was charged; start anew")
        return super().train(**arguments)

    def get_train_dataloader(self) -> DataLoader:
        return self.accelerator.prepare(self._private_loader)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None) -> Any:
        """The mean over rows of each row's mean over its own tokens; labels of -100 do not count.

        The Trainer's own loss is wrong here: it divides by ``num_items_in_batch``, the number of
        tokens of the batch, so that the length of one record weighs the gradients of all others.
        A model that sees the labels computes such a loss as well.
        """
        inputs = dict(inputs)
        labels = inputs.pop("labels")[:, 1:]
        outputs = model(**inputs)
        logits = outputs.logits[:, :-1].float().transpose(1, 2)
        losses = cross_entropy(logits, labels, reduction="none")  # 0 where the label is -100
        loss = (losses.sum(1) / (labels != -100).sum(1).clamp(min=1)).mean()
        return (loss, outputs) if return_outputs else loss

    def training_step(self, *arguments: Any, **keywords: Any) -> Tensor:
        """A step whose loss does not reach the log, the progress bar or trainer_state.json."""
        return torch.zeros_like(super().training_step(*arguments, **keywords))

    def floating_point_ops(self, inputs: dict[str, Tensor]) -> int:
        """None: `total_flos` would tell how many records, or tokens, the batches had."""
        return 0

    def num_examples(self, dataloader: DataLoader) -> int:
        """What samples per second are made from; for training a public number."""
        n_expected = len(dataloader) * self.args.per_device_train_batch_size
        return n_expected if self.is_in_train else super().num_examples(dataloader)


def private_trainer(
    model: nn.Module,
    args: TrainingArguments,
    train_dataset: Dataset,
    *,
    target_epsilon: float,
    target_delta: float,
    sample_rate: float | None = None,
    **arguments: Any,
) -> tuple[PrivateTrainer, PrivacyEngine]:
    """A Trainer whose ``train()`` spends at most ``target_epsilon``, and what counts it.

    ``args.per_device_train_batch_size`` is the expected batch size, ``args.max_grad_norm`` the
    bound of one record; ``args.max_steps`` plans steps in place of epochs. Other ``arguments`` are
    the Trainer's, as eval_dataset, whose loss is logged: it must not hold private records.
    Sentences are padded to one constant length, by ``train_dataset`` or a data_collator with
    `padding="max_length"`; one that pads to the longest of a batch is refused.
    """
    if args.n_gpu > 1:
        raise ValueError(f"private training uses one device, got {args.n_gpu}; show it one GPU")
    trained = [param for param in model.to(args.device).parameters() if param.requires_grad]
    engine = PrivacyEngine()
    optimizer = torch.optim.AdamW(trained, lr=args.learning_rate, weight_decay=args.weight_decay)
    model, optimizer, loader = engine.make_private_with_epsilon(
        module=model,
        optimizer=optimizer,
        data_loader=DataLoader(
            train_dataset,
            batch_size=args.per_device_train_batch_size,
            num_workers=args.dataloader_num_workers,
            collate_fn=arguments.get("data_collator"),
        ),
        target_epsilon=target_epsilon,
        target_delta=target_delta,
        epochs=math.ceil(args.num_train_epochs) if args.max_steps < 1 else None,
        num_steps=args.max_steps if args.max_steps > 0 else None,
        max_grad_norm=args.max_grad_norm,
        sample_rate=sample_rate,
    )
    given = {"model": model, "args": args, "train_dataset": train_dataset} | arguments
    return PrivateTrainer(private_loader=loader, optimizers=(optimizer, None), **given), engine
