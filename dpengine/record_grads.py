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
    is_coarse: whether they were rounded below float32 where the number of rows is not public.
    """

    grads: PerRecordGrads = field(repr=False)
    is_record: Tensor = field(repr=False)
    n_rows: int = field(repr=False)
    is_first: bool
    is_last: bool | None
    n_passes: int = 1
    charged: float | None = None
    logical: object = field(default=None, repr=False)
    is_coarse: bool | Tensor = field(default=False, repr=False)

    @property
    def per_record_grads(self) -> list[Tensor]:
        """[N, *param.shape] each, in the order of ``Capture.parameters``."""
        return self.grads.by_param

    def check_charge(self, noise_multiplier: float, charged_only: bool) -> None:
        """Raise PrivacyError unless they were charged with what their sum gets."""
        is_charged = self.charged == noise_multiplier
        if not is_charged and (charged_only or self.charged is not None):
            raise PrivacyError(
                "a batch must be charged with the noise multiplier that its sum gets, and this one "
                "was not; train on the loader that make_private returned, with the optimizer that "
                "it returned, and call make_private for another optimizer or a copy"
            )

    def check_precision(self) -> None:
        """Raise PrivacyError where a mean over a private number of rows has rounded them.

        Such a loss sends ``g / n`` back, whose rounding to 8 or 11 bits depends on n: one record
        more moves the gradients of all others, by up to 2⁻⁸ or 2⁻¹¹ of the bound each.
        """
        if self.is_coarse:
            raise PrivacyError(
                "a mean over a private number of rows is rounded below float32 on its way back, "
                "which moves the gradients of all records: give make_private static_batch=, or sum "
                "the loss and say loss_reduction='sum', or use float32 throughout, the loss too, "
                "with torch.set_float32_matmul_precision('highest') and, on a GPU, "
                "torch.backends.cudnn.allow_tf32 = False"
            )


@dataclass
class BatchSlots:
    """The slots of one forward and backward pass; the layers' Functions hold on to it."""

    n_rows: int = field(repr=False)
    notice: BatchNotice = field(repr=False)
    grads: PerRecordGrads | None = field(repr=False)
    impl: str
    state: str = "open"  # then "backward", then "closed"
    is_coarse: bool | Tensor = field(default=False, repr=False)  # something below float32 took part

    @property
    def n_slots(self) -> int:
        return self.notice.n_slots

    def note_rounding(self, is_coarse: bool | Tensor) -> None:
        """Take in whether something was rounded below float32; on a GPU a tensor not awaited."""
        self.is_coarse = self.is_coarse | is_coarse

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
