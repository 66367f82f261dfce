"""Which rule a layer gets."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from . import conv, embedding, fallback, linear, lora, norm
from .rule import SlotSet

_RULES: dict[Callable[..., Tensor], tuple[Callable[..., Tensor], Callable[..., bool] | None]] = {
    nn.Linear.forward: (linear.forward, None),
    nn.Conv1d.forward: (conv.forward, conv.covers),
    nn.Conv2d.forward: (conv.forward, conv.covers),
    nn.Embedding.forward: (embedding.forward, embedding.covers),
    nn.GroupNorm.forward: (norm.group_norm, None),
    nn.LayerNorm.forward: (norm.layer_norm, None),
    nn.RMSNorm.forward: (norm.rms_norm, None),
}


@dataclass(frozen=True)
class TrainedLayer:
    """A module that owns trainable tensors, and the rule for all of them."""

    name: str
    module: nn.Module
    shared: dict[Any, int | None] = field(default_factory=dict, compare=False, repr=False)
    """Which arguments have no rows, as the fallback has learned."""

    @property
    def parameters(self) -> list[nn.Parameter]:
        """The tensors that the rule covers, those that are frozen now left out."""
        return [param for param in self.module.parameters() if param.requires_grad]

    def is_active(self) -> bool:
        """Whether a forward pass of the module has anything to train."""
        if isinstance(self.module, lora.LoraLayer):
            return lora.trainable_adapter(self.name, self.module) is not None
        return any(param.requires_grad for param in self.module.parameters())

    @property
    def configuration(self) -> tuple:
        """Whether the layer trains, and the scaling of its adapters."""
        scaling = getattr(self.module, "scaling", {})
        return self.is_active(), tuple(scaling.items()) if isinstance(scaling, dict) else ()

    def check_arguments(self, *args: Any, **kwargs: Any) -> None:
        """Raise ValueError for arguments whose first axis does not count the rows of the batch."""
        if isinstance(self.module, nn.EmbeddingBag):
            embedding.check_bags(self.name, *args, **kwargs)

    def forward(self, slot_set: SlotSet, n_rows: int, *args: Any, **kwargs: Any) -> Any:
        """The module's output, the gradients of its parameters kept apart by record."""
        module = self.module
        if isinstance(module, lora.LoraLayer):
            adapter = lora.trainable_adapter(self.name, module)
            if len(args) != 1 or kwargs:
                raise ValueError(
                    f"layer {self.name!r} got {len(args)} arguments and {sorted(kwargs)}; mixed "
                    "adapters in one batch have no per-record rule: train one adapter at a time"
                )
            return lora.forward(module, adapter, slot_set, *args)
        rule = _rule(module)
        if rule is None:
            return fallback.forward(module, slot_set, n_rows, self.shared, *args, **kwargs)
        return rule(module, slot_set, *args, *kwargs.values())


def _rule(module: nn.Module) -> Callable[..., Tensor] | None:
    """The rule for all trainable tensors under ``module``; None where the fallback must do."""
    rule, covers = _RULES.get(type(module).forward, (None, None))
    # A parametrised weight is computed from trainable tensors that no rule knows.
    known = all(
        name in ("weight", "bias") for name, p in module.named_parameters() if p.requires_grad
    )
    return rule if known and (covers is None or covers(module)) else None


def trained_layers(module: nn.Module) -> list[TrainedLayer]:
    """The layers of ``module`` with trainable tensors, each tensor under one layer or more.

    Where no rule knows a module's own tensors, all that is under it belongs to the fallback.
    Raises TypeError or ValueError for a layer that no rule can cover, with the way out.
    """
    return list(_visit("", module, set()))


def _visit(name: str, module: nn.Module, seen: set[nn.Module]) -> Iterator[TrainedLayer]:
    if module in seen:
        return
    seen.add(module)
    if isinstance(module, BaseTunerLayer):
        if any(param.requires_grad for param in module.parameters()):
            lora.check(name, module)
            yield TrainedLayer(name, module)
    elif any(param.requires_grad for param in _own_parameters(module)):
        _check(name, module)
        yield TrainedLayer(name, module)
    else:
        for child_name, child in module.named_children():
            yield from _visit(f"{name}.{child_name}" if name else child_name, child, seen)


def _own_parameters(module: nn.Module) -> Iterator[nn.Parameter]:
    """The parameters that belong to the module itself, those behind a parametrised one too.

    One that a child owns as well is the child's: Opacus' DPLSTM registers those of its cells again,
    under LSTM's names.
    """
    if is_parametrized(module):
        return module.parameters()
    of_children = {id(param) for child in module.children() for param in child.parameters()}
    return (p for p in module.parameters(recurse=False) if id(p) not in of_children)


def _check(name: str, module: nn.Module) -> None:
    for child_name, child in module.named_modules(prefix=name):
        if isinstance(child, nn.Embedding | nn.EmbeddingBag) and not embedding.covers(child):
            raise ValueError(
                f"embedding {child_name!r} has max_norm or scale_grad_by_freq set, which make a "
                "record's gradient depend on the ids of the others: set them to None and False"
            )
        hooks = {type(hook).__name__ for hook in child._forward_pre_hooks.values()}
        if hooks & {"WeightNorm", "SpectralNorm"}:
            raise TypeError(
                f"layer {child_name!r} computes its weight in a hook, which no rule sees; use "
                "torch.nn.utils.parametrizations instead"
            )
        if isinstance(child, nn.RNNBase):
            raise TypeError(
                f"layer {child_name!r} is a recurrent {type(child).__name__}, which has no "
                "per-record rule: freeze it, run nn.LSTMCell, nn.GRUCell or nn.RNNCell in a loop, "
                "or take Opacus' DPLSTM, DPGRU or DPRNN"
            )
        if isinstance(child, BaseTunerLayer) and not isinstance(child, lora.LoraLayer):
            kind = type(child)
            raise TypeError(
                f"layer {child_name!r} is a {kind.__module__}.{kind.__name__}, which has no "
                "per-record rule: use LoraConfig"
            )
