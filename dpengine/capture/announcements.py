"""Which batch of the sampler a forward pass belongs to.

The sampler announces every physical batch that it hands out; the i-th forward pass belongs to the
i-th batch. A batch that is skipped must not pass its place in the logical batch on to another, or
a record could enter one sum twice. So the loader must be ahead of the model by exactly the batches
that it is known to prefetch, whenever a pass begins.
"""

from collections import deque
from collections.abc import Callable

from ..errors import PrivacyError
from ..mechanism.batches import BatchNotice
from ..mechanism.private import Private

_NOT_USED = (
    "the sampler's last batch was not used: forward, backward and step() must follow each batch "
    "before the next one; to accumulate over smaller batches use BatchMemoryManager, to give a "
    "batch up call the optimizer's discard(), to evaluate or to cache latents take a DataLoader of "
    "your own over the data, and set a PoissonSampler's prefetch where a loader works ahead"
)


class Announcements:
    """The batches announced and not yet begun, in order.

    is_idle: whether no batch is being worked on.
    """

    def __init__(self, is_idle: Callable[[], bool] = lambda: True) -> None:
        self._is_idle = is_idle
        self._waiting: deque[BatchNotice | None] = deque()
        self._prefetch: int | None = None
        self._held_back: Callable[[], int] = int
        self._lost = False
        self._pass = 0

    def begin_pass(self) -> int:
        """Give up what was announced. The number of the pass that begins, the one that counts."""
        self.clear()
        self._pass += 1
        return self._pass

    def expect(self) -> None:
        """From now on every pass needs a notice, before the first one has come too."""
        if self._prefetch is None:
            self._prefetch = 0

    @property
    def are_expected(self) -> bool:
        """Whether every pass needs a notice."""
        return self._prefetch is not None

    def release(self) -> None:
        """No notice is needed any more."""
        self.clear()
        self._prefetch = None

    def announce(
        self,
        notice: BatchNotice | None,
        prefetch: int = 0,
        held_back: Callable[[], int] = int,
        of_pass: int | None = None,
    ) -> None:
        """Tell of the next physical batch. From the first call on, every pass needs a notice.

        prefetch: how many batches the loader asks for ahead of the one at work. held_back: how many
        more a loader around it holds when it is called, as a pass begins. None as notice: the
        loader has asked again after the last batch.

        Raises PrivacyError while a batch is at work, and without prefetching while one waits. The
        loader has then lost a batch, and every pass is refused until ``clear``.
        """
        if of_pass not in (None, self._pass):
            if notice is None:
                return
            raise PrivacyError(
                "a pass over the loader went on after another had begun, and its batches could "
                "enter a sum of the other; use one pass at a time"
            )
        works_ahead = prefetch > 0 or held_back() > 0
        if not self._is_idle() or (self._waiting and not works_ahead):
            self._lost = True
            raise PrivacyError(_NOT_USED)
        self._prefetch, self._held_back = prefetch, held_back
        if notice is not None and not any(self._waiting):
            self._waiting.clear()  # the ends of an earlier pass over the sampler
        if notice is not None or works_ahead:
            self._waiting.append(notice)

    def clear(self) -> None:
        """Give up all that was announced; what was charged stays charged."""
        self._waiting.clear()
        self._lost = False

    def next(self, n_slots: int) -> BatchNotice:
        """The batch of a pass over ``n_slots`` records that begins now.

        Without a sampler, a batch whose end the optimizer's signals tell. Raises PrivacyError where
        the loader is not ahead by its prefetch, or where none or another size was announced.
        """
        if self._prefetch is None:
            return BatchNotice(Private(n_slots), n_slots, is_first=False, is_last=None)
        if self._lost:
            raise PrivacyError(_NOT_USED)
        ahead = len(self._waiting) - 1
        prefetch = self._prefetch + self._held_back()
        if ahead not in (-1, prefetch):
            raise PrivacyError(
                f"the loader is not ahead of the model by the sampler's prefetch, {prefetch} "
                "batches: every batch must be used, once; prefetch must be workers times "
                "prefetch_factor of a DataLoader, and one more after accelerator.prepare"
            )
        notice = self._waiting.popleft() if self._waiting else None
        if notice is None:
            raise PrivacyError(
                "a batch came that the sampler did not announce: every batch must come from the "
                "sampler, once; train on the loader that make_private returned. To train another "
                "model through this one, as a GAN's generator through its discriminator, call its "
                "eval() before that pass and train() after it"
            )
        if notice.n_slots != n_slots:
            raise PrivacyError(
                "a batch of another size came than the sampler announced: call the module on all "
                "rows of a batch, row n * K + k for draw k of record n with K = draws_per_record, "
                "and on nothing kept from an earlier pass: latents that are computed once belong "
                "in the dataset. Rows of public images, as for prior preservation, are no draws: "
                "leave them out, and give their loss to the optimizer's attach_public_loss"
            )
        return notice
