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
    size_rounds: whether a mean over the rows rounded every record's gradient by the private number
    of rows.
    """

    grads: PerRecordGrads = field(repr=False)
    is_record: Tensor = field(repr=False)
    n_rows: int = field(repr=False)
    is_first: bool
    is_last: bool | None
    n_passes: int = 1
    charged: float | None = None
    logical: object = None
    size_rounds: bool = False

    @property
    def per_record_grads(self) -> list[Tensor]:
        """[N, *param.shape] each, in the order of ``Capture.parameters``."""
        return self.grads.by_param

    def refuse_rounded_mean(self) -> None:
        """Raise PrivacyError where one record more would have rounded all the others anew.

        A mean divides what flows backward by the number of rows n, and the type that it is held in
        rounds it before it is multiplied by n again. In bfloat16 each of N records moves by up to
        2⁻⁸ of itself when n changes: 2⁻⁸ N C together, many times the noise. With a constant n, or
        a sum, a record is rounded the same way whoever is beside it.
        """
        if self.size_rounds:
            raise PrivacyError(
                "below float32 the mean over a batch of varying size rounds every record by the "
                "number of the others, beyond what the noise covers: pad batches to a constant "
                "size, make_private(static_batch=...), or take the sum over rows as the loss, with "
                "loss_reduction='sum'"
            )


@dataclass
class BatchSlots:
    """The slots of one forward and backward pass; the layers' Functions hold on to it."""

    n_rows: int
    notice: BatchNotice
    grads: PerRecordGrads | None
    impl: str
    state: str = "open"  # then "backward", then "closed"
    is_low_precision: bool = False

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
