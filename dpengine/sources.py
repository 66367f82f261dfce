"""Where an optimizer's per-record gradients come from."""

from torch import Tensor
from torch.optim import Optimizer

from . import capture
from .capture import Capture
from .grad_samples import GradSamples

Source = Capture | GradSamples


def trainable(optimizer: Optimizer) -> list[Tensor]:
    """The trainable tensors of all groups."""
    groups = optimizer.param_groups
    return [param for group in groups for param in group["params"] if param.requires_grad]


def find(params: list[Tensor]) -> Source:
    """The source of all of ``params``: their ``Capture``, or their `grad_sample`.

    Raises ValueError where there is neither, or both, or not one for all of them.
    """
    if not params:
        raise ValueError("the optimizer holds no trainable tensor; give it the adapter's")
    sampled = [hasattr(param, "grad_sample") for param in params]
    captured = capture.of(params)
    if any(sampled) and any(capture.of([param]) for param in params):
        raise ValueError(
            "parameters are captured and hold a grad_sample of Opacus' GradSampleModule as well: "
            "leave that module out, or its to_standard_module() after it, or call the capture's "
            "detach()"
        )
    if all(sampled):
        return GradSamples(params)
    if captured is None:
        raise ValueError(
            "the optimizer's trainable parameters must all be captured by one Capture, or all "
            "belong to Opacus' GradSampleModule; call Capture(module) or make_private before, and "
            "give the optimizer no tensor that was added since"
        )
    return captured


def check_complete(source: Source, params: list[Tensor]) -> None:
    """Raise ValueError unless ``params`` are all that ``source`` takes gradients of."""
    if {id(param) for param in params} != {id(param) for param in source.parameters}:
        raise ValueError(
            "the optimizer must hold every trainable tensor of the captured module: give it "
            "capture.parameters, add the others by add_param_group, or freeze them before Capture"
        )


def same(one: Source, other: Source | None) -> bool:
    """Whether both give the gradients of one batch under way."""
    if isinstance(one, GradSamples) and isinstance(other, GradSamples):
        return list(map(id, one.parameters)) == list(map(id, other.parameters))
    return one is other
