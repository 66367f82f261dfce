"""Which batch of the sampler a forward pass belongs to.

The sampler announces every physical batch that it hands out; the i-th forward pass belongs to the
i-th batch. A batch that is skipped must not pass its place in the logical batch on to another, or
a record could enter one sum twice. So the loader must be ahead of the model by exactly the batches
that it is known to prefetch, whenever a pass begins.
"""

from collections import deque
from dataclasses import dataclass, field

from .errors import PrivacyError

_NOT_USED = (
    "the sampler's last batch was not used: forward, backward and step() must follow each batch "
    "before the next one; call the optimizer's discard() to give it up, and set the sampler's "
    "prefetch where a loader works ahead"
)


@dataclass(frozen=True)
class BatchNotice:
    """What a sampler says of a physical batch: its shape, and its place in the logical batch.

    The first ``n_records`` of ``n_slots`` are records, the others padding.
    """

    n_records: int = field(repr=False)
    n_slots: int
    is_first: bool
    is_last: bool


class Notices:
    """The batches announced and not yet begun, in order."""

    def __init__(self) -> None:
        self._waiting: deque[BatchNotice | None] = deque()
        self._prefetch: int | None = None
        self._lost = False

    def announce(self, notice: BatchNotice | None, prefetch: int, idle: bool) -> None:
        """Tell of the next physical batch. From the first call on, every pass needs a notice.

        prefetch: how many batches the loader asks for ahead of the one at work. None as notice:
        the loader has asked again after the last batch. idle: no batch is being worked on.

        Raises PrivacyError while a batch is at work, and without prefetching while one waits. The
        loader has then lost a batch, and every pass is refused until ``clear``.
        """
        if not idle or (prefetch == 0 and self._waiting):
            self._lost = True
            raise PrivacyError(_NOT_USED)
        self._prefetch = prefetch
        if notice is not None and not any(self._waiting):
            self._waiting.clear()  # the ends of an earlier pass over the sampler
        if notice is not None or prefetch > 0:
            self._waiting.append(notice)

    def clear(self) -> None:
        """Give up all that was announced; what was charged stays charged."""
        self._waiting.clear()
        self._lost = False

    def next(self, n_slots: int) -> BatchNotice:
        """The batch of a pass over ``n_slots`` records that begins now.

        Without a sampler, a logical batch of its own. Raises PrivacyError where the loader is not
        ahead by its prefetch, or where none or another size was announced.
        """
        if self._prefetch is None:
            return BatchNotice(n_slots, n_slots, is_first=True, is_last=True)
        if self._lost:
            raise PrivacyError(_NOT_USED)
        ahead = len(self._waiting) - 1
        if ahead not in (-1, self._prefetch):
            raise PrivacyError(
                f"the loader is {ahead} batches ahead of the model where the sampler's prefetch is "
                f"{self._prefetch}: every batch must be used, once; prefetch must be workers times "
                "prefetch_factor of a DataLoader, and one more after accelerator.prepare"
            )
        notice = self._waiting.popleft() if self._waiting else None
        if notice is None:
            raise PrivacyError(
                "a batch came that the sampler did not announce: every batch must come from the "
                "sampler, once"
            )
        if notice.n_slots != n_slots:
            raise PrivacyError(
                f"the sampler announced a batch of {notice.n_slots} records, padding included, "
                f"and one of {n_slots} came"
            )
        return notice
