"""Who runs a training step: stock PEFT, dpengine and the modes of Opacus, each a `Start`.

Each begins training of a module that is ready but for what the peer itself puts on it, and gives
the step as its documentation has it and the same step in phases:

    forward    the model and the loss
    backward   the backward pass, with what rides on it: per-record gradients, or their norms
    clip       norms, clip factors and the clipped sum; in Opacus' `ghost` the second backward pass
    noise      the noise, and the division by the batch size
    optimizer  the update and zero_grad

Where a peer runs two of them as one, that one has both names. The non-private step neither clips
nor noises.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from dpengine import Capture, DPOptimizer
from dpengine.execution.passes import How, make_pass
from dpengine.mechanism.batches import BatchNotice
from dpengine.mechanism.private import Private

MAX_GRAD_NORM = 0.01
"""Where steps are timed: it clips every record, as a bound of DP training does."""

FORWARD, BACKWARD, CLIP, NOISE, OPTIMIZER = "forward", "backward", "clip", "noise", "optimizer"
PHASES = (FORWARD, BACKWARD, CLIP, NOISE, OPTIMIZER)

Loss = Callable[..., Tensor]
Phase = Callable[..., None]


@dataclass(frozen=True)
class Setup:
    """What a peer is given.

    ``loss(module, *inputs)`` is the mean of ``row_losses(module, *inputs)`` [N·K] over the rows;
    row ``n·K + k`` is draw k of record n, with K = ``draws``.
    """

    module: nn.Module
    loss: Loss
    row_losses: Loss
    optimizer: Optimizer
    n_records: int
    noise_multiplier: float
    draws: int = 1
    max_grad_norm: float = MAX_GRAD_NORM

    @property
    def private(self) -> dict[str, float]:
        """The arguments of a private optimizer."""
        return {
            "noise_multiplier": self.noise_multiplier,
            "max_grad_norm": self.max_grad_norm,
            "expected_batch_size": self.n_records,
        }


@dataclass(frozen=True)
class Training:
    """``step(*inputs)`` is one update of ``params``; so are its ``phases``, called in their order.

    Each phase is given the inputs as well.
    """

    step: Callable[..., None]
    params: list[nn.Parameter]
    phases: dict[str, Phase] = field(default_factory=dict)


Start = Callable[[Setup], Training]


def non_private(setup: Setup) -> Training:
    """An ordinary loop over an ordinary optimizer."""
    return _training(setup, setup.module, setup.optimizer, {OPTIMIZER: _update(setup.optimizer)})


def non_private_compiled(setup: Setup) -> Training:
    """The same loop over a module that `torch.compile` has compiled, forward and backward."""
    compiled = torch.compile(setup.module, fullgraph=True)
    return _training(setup, compiled, setup.optimizer, {OPTIMIZER: _update(setup.optimizer)})


def _announce(capture: Capture, draws: int, module: nn.Module, args: tuple) -> None:
    """Say that the number of rows is public, as a loader with `static_batch` does."""
    n = len(args[0]) // draws
    capture.announcements.announce(
        BatchNotice(Private(n), n, is_first=True, is_last=True, is_public=True)
    )


def dpengine(setup: Setup, how: How = "eager") -> Training:
    """dpengine through its public API; ``how`` as in ``make_pass``."""
    capture = Capture(setup.module, draws_per_record=setup.draws)
    optimizer = DPOptimizer(setup.optimizer, **setup.private)
    later = {
        CLIP: torch.no_grad()(lambda *_: optimizer.clip_and_accumulate()),
        NOISE: torch.no_grad()(lambda *_: optimizer.add_noise()),
        OPTIMIZER: _update(optimizer),
    }
    if how == "eager":
        announce = partial(_announce, capture, setup.draws)
        setup.module.register_forward_pre_hook(announce, prepend=True)
        return _training(setup, setup.module, optimizer, later)
    recorded = make_pass(capture, partial(setup.loss, setup.module), how)

    def step(*inputs: Tensor) -> None:
        recorded(*inputs)
        optimizer.step()
        optimizer.zero_grad()

    return Training(step, _trainable(setup), {f"{FORWARD} and {BACKWARD}": recorded, **later})


def opacus_hooks(setup: Setup) -> Training:
    """Opacus' own formula of each layer, in hooks: its default."""
    from opacus import GradSampleModule

    return _opacus(setup, GradSampleModule(setup.module))


def opacus_functorch(setup: Setup) -> Training:
    """Each layer's gradient mapped over the records by functorch."""
    from opacus import GradSampleModule

    return _opacus(setup, GradSampleModule(setup.module, force_functorch=True))


def opacus_ew(setup: Setup) -> Training:
    """PyTorch's ExpandedWeights."""
    from opacus.grad_sample.gsm_exp_weights import GradSampleModuleExpandedWeights

    return _opacus(setup, GradSampleModuleExpandedWeights(setup.module))


def opacus_ghost(setup: Setup) -> Training:
    """Ghost clipping: a first backward pass for the norms, a second one for the clipped sum.

    The step is Opacus' ``DPTensorFastGradientClipping``, which its wrapped loss returns; the phases
    are what that does, with the second backward pass as part of `clip`.
    """
    from opacus.grad_sample import GradSampleModuleFastGradientClipping as Ghost
    from opacus.optimizers import DPOptimizerFastGradientClipping
    from opacus.utils.fast_gradient_clipping_utils import DPTensorFastGradientClipping

    module = Ghost(setup.module, max_grad_norm=setup.max_grad_norm, use_ghost_clipping=True)
    optimizer = DPOptimizerFastGradientClipping(setup.optimizer, **setup.private)
    losses: list[Tensor] = []

    def step(*inputs: Tensor) -> None:
        loss = DPTensorFastGradientClipping(module, optimizer, setup.row_losses(module, *inputs))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    def forward(*inputs: Tensor) -> None:
        losses[:] = [setup.row_losses(module, *inputs)]

    def clip(*_: Tensor) -> None:
        optimizer.zero_grad()
        clip_factors = module.get_clipping_coef()
        module.disable_hooks()
        (clip_factors * losses.pop()).sum().backward()
        module.enable_hooks()
        optimizer.accumulate()

    phases = {
        FORWARD: forward,
        BACKWARD: lambda *_: losses[0].mean().backward(retain_graph=True),
        CLIP: clip,
        NOISE: _noise(optimizer),
        OPTIMIZER: _update(optimizer),
    }
    return Training(step, _trainable(setup), phases)


PEERS: dict[str, Start] = {
    "non-private": non_private,
    "dpengine": dpengine,
    "non-private inductor": non_private_compiled,
    "dpengine inductor": partial(dpengine, how="inductor"),
    "dpengine cuda-graph": partial(dpengine, how="cuda-graph"),
    "opacus hooks": opacus_hooks,
    "opacus functorch": opacus_functorch,
    "opacus ew": opacus_ew,
    "opacus ghost": opacus_ghost,
}
NON_PRIVATE, OURS, PLAIN_INDUCTOR, INDUCTOR, CUDA_GRAPH, HOOKS, FUNCTORCH, EW, GHOST = PEERS
WITHOUT_PRIVACY, COMPILED = (NON_PRIVATE, PLAIN_INDUCTOR), (PLAIN_INDUCTOR, INDUCTOR)
RECORDED = (*COMPILED, CUDA_GRAPH)
"""What compiles or records its first call, and then takes inputs of that shape only."""


def draws_as_records(setup: Setup) -> Training:
    """K draws of a record as K rows of Opacus, each clipped: a record then moves the sum by K·C.

    This is not what the others compute. Opacus noises it as if a record moved it by C.
    """
    return opacus_hooks(setup)


def draws_averaged(setup: Setup) -> Training:
    """All draws in one backward pass of Opacus, and ``grad_sample`` averaged over K by hand."""

    def gradients(module: nn.Module, params: list[nn.Parameter], inputs: tuple) -> None:
        setup.loss(module, *inputs).backward()
        for param in params:
            param.grad_sample = param.grad_sample.unflatten(0, (-1, setup.draws)).mean(1)

    return _opacus_by_hand(setup, gradients)


def draws_in_a_loop(setup: Setup) -> Training:
    """K backward passes of Opacus over one draw of each record; one sum of them is kept."""

    def gradients(module: nn.Module, params: list[nn.Parameter], inputs: tuple) -> None:
        totals: list[Tensor] = []
        for draw in range(setup.draws):
            setup.loss(module, *(tensor[draw :: setup.draws] for tensor in inputs)).backward()
            grads = [param.grad_sample for param in params]
            for param in params:
                param.grad_sample = param.grad = None
            totals = [a.add_(b) for a, b in zip(totals, grads, strict=True)] if totals else grads
        for param, total in zip(params, totals, strict=True):
            param.grad_sample = total.div_(setup.draws)

    return _opacus_by_hand(setup, gradients)


DRAWS_PEERS: dict[str, Start] = {
    NON_PRIVATE: non_private,
    OURS: dpengine,
    "opacus, draws as records": draws_as_records,
    "opacus, averaged by hand": draws_averaged,
    "opacus, loop over draws": draws_in_a_loop,
}
"""What several draws of a record are trained with."""
AS_RECORDS, AVERAGED, LOOP = list(DRAWS_PEERS)[2:]


def _opacus_by_hand(
    setup: Setup, gradients: Callable[[nn.Module, list[nn.Parameter], tuple], None]
) -> Training:
    """``gradients`` leaves those of each record in ``grad_sample``; Opacus does the rest."""
    from opacus import GradSampleModule
    from opacus.optimizers import DPOptimizer as OpacusOptimizer

    module = GradSampleModule(setup.module)
    optimizer = OpacusOptimizer(setup.optimizer, **setup.private)
    params = _trainable(setup)

    def step(*inputs: Tensor) -> None:
        gradients(module, params, inputs)
        optimizer.step()
        optimizer.zero_grad()

    return Training(step, params)


def _opacus(setup: Setup, module: nn.Module) -> Training:
    from opacus.optimizers import DPOptimizer as OpacusOptimizer

    optimizer = OpacusOptimizer(setup.optimizer, **setup.private)
    later = {
        CLIP: lambda *_: optimizer.clip_and_accumulate(),
        NOISE: _noise(optimizer),
        OPTIMIZER: _update(optimizer),
    }
    return _training(setup, module, optimizer, later)


def _training(
    setup: Setup, module: nn.Module, optimizer: Optimizer, later: dict[str, Phase]
) -> Training:
    """A step of one loss and one backward pass."""
    losses: list[Tensor] = []

    def step(*inputs: Tensor) -> None:
        # As in a training loop, the loss outlives the step.
        loss = setup.loss(module, *inputs)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    def forward(*inputs: Tensor) -> None:
        losses[:] = [setup.loss(module, *inputs)]

    phases = {FORWARD: forward, BACKWARD: lambda *_: losses[0].backward(), **later}
    return Training(step, _trainable(setup), phases)


def _noise(optimizer: Optimizer) -> Phase:
    def noise(*_: Tensor) -> None:
        optimizer.add_noise()
        optimizer.scale_grad()

    return noise


def _update(optimizer: Optimizer) -> Phase:
    inner = getattr(optimizer, "original_optimizer", optimizer)

    def update(*_: Tensor) -> None:
        inner.step()
        optimizer.zero_grad()

    return update


def _trainable(setup: Setup) -> list[nn.Parameter]:
    return [param for param in setup.module.parameters() if param.requires_grad]
