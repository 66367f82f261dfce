"""The per-record gradients of one forward and backward pass: on their way, and when they leave."""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from .errors import PrivacyError
from .notices import BatchNotice
from .slab import PerRecordGrads


@dataclass(frozen=True)
class RecordGrads:
    """Per-record gradients of one physical batch; on a GPU until the next backward pass.

    is_record: bool [N]. n_rows: by how many rows a mean loss was divided, padding included; 1 where
    that is undone already. is_first, is_last: its place in the logical batch, as in
    ``BatchNotice``. n_passes: backward passes that it was gathered from. charged: the noise
    multiplier that it was charged with, if it was. logical: an object that those of one sum share.
    """

    grads: PerRecordGrads = field(repr=False)
    is_record: Tensor = field(repr=False)
    n_rows: int
    is_first: bool
    is_last: bool | None
    n_passes: int = 1
    charged: float | None = None
    logical: object = None

    @property
    def per_record_grads(self) -> list[Tensor]:
        """[N, *param.shape] each, in the order of ``Capture.parameters``."""
        return self.grads.by_param


@dataclass
class BatchSlots:
    """The slots of one forward and backward pass; the layers' Functions hold on to it."""

    n_rows: int
    notice: BatchNotice
    grads: PerRecordGrads | None
    impl: str
    state: str = "open"  # then "backward", then "closed"

    @property
    def n_slots(self) -> int:
        return self.notice.n_slots

    def view(self, param: Tensor) -> Tensor | None:
        return self.grads.view(param)

    def postpone(self, param: Tensor, backprops: Tensor, activations: Tensor) -> bool:
        return self.grads.postpone(param, backprops, activations)

    def record(self, param: Tensor, grads: Tensor) -> None:
        self.grads.record(param, grads)

    def on_backward(self) -> None:
        if torch.is_grad_enabled():
            raise PrivacyError(
                "backward(create_graph=True) and gradient penalties have no per-record rule: leave "
                "them out"
            )
        if self.state == "closed":
            raise PrivacyError(
                "backward ran twice through one forward pass, or through one whose batch was given "
                "up; its records would count twice: sum the losses and call backward once"
            )
        if self.state == "open":
            self.state = "backward"
            torch.autograd.Variable._execution_engine.queue_callback(self._close)

    def on_replay(self, params: tuple[Tensor, ...], grads: list[Tensor]) -> None:
        """A recorded pass has computed the gradients of ``params``."""
        for param, grad in zip(params, grads, strict=True):
            self.grads.record(param, grad)
        self._close()

    def _close(self) -> None:
        self.grads.finish()
        self.state = "closed"
