"""Logical batches larger than memory: Opacus' ``BatchMemoryManager``."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace

import numpy as np
from torch.utils.data import DataLoader

from ..capture import Capture
from ..errors import PrivacyError, positive_int
from ..optimizer import DPOptimizer
from .loader import DPDataLoader, IndexBatches, held_back, lookahead, settings


class BatchMemoryManager:
    """Cuts the batches of ``data_loader`` into physical ones of at most the given number of rows.

    ``with BatchMemoryManager(...) as loader`` gives the loader to iterate over. ``step()`` after
    each physical batch adds to the sum, and the last one of a logical batch is noised and applied.
    The module's capture is told where a logical batch ends, and takes no other batches meanwhile;
    where gradients come from Opacus' ``GradSampleModule``, the optimizer is told by
    ``signal_skip_step``. A person's rows stay together.
    """

    def __init__(
        self, data_loader: DataLoader, max_physical_batch_size: int, optimizer: DPOptimizer
    ) -> None:
        positive_int(max_physical_batch_size=max_physical_batch_size)
        self.data_loader, self.optimizer = data_loader, optimizer
        self.max_physical_batch_size = max_physical_batch_size
        self._release: Callable[[], None] = lambda: None

    def __enter__(self) -> DataLoader:
        batches, how = self.data_loader.batch_sampler, settings(self.data_loader)
        rate = getattr(batches, "rate", None)
        rows = 1 if rate is None else rate.rows_per_unit
        n_units = max(1, self.max_physical_batch_size // rows)
        # accelerate wraps a DPOptimizer in one of its own.
        source = getattr(self.optimizer, "optimizer", self.optimizer).source
        if not isinstance(source, Capture):
            signalled = _Signalled(
                batches, n_units, self.optimizer, rows, prefetch=lookahead(self.data_loader)
            )
            how["collate_fn"] = self.data_loader.collate_fn
            return DataLoader(self.data_loader.dataset, batch_sampler=signalled, **how)
        if not isinstance(batches, IndexBatches):
            batches = IndexBatches(
                len(self.data_loader.dataset),
                getattr(batches, "batch_size", n_units),
                order=batches,
                is_distinct=False,
            )
        if not source.expects_announcements:
            source.expect_announcements()
            self._release = source.release_announcements
        batches = replace(
            batches,
            physical_batch_size=n_units,
            capture=batches.capture or source,
            prefetch=lookahead(self.data_loader),
        )
        return DPDataLoader(self.data_loader.dataset, batches=batches, **how)

    def __exit__(self, *exception: object) -> None:
        self._release()


@dataclass(frozen=True, eq=False)
class _Signalled:
    """The batches of a sampler in pieces; the optimizer is told which of them are not the last.

    Raises PrivacyError where a piece was not followed by ``step``: its signal would go to another.
    """

    batches: Iterable[list[int]]
    n_units: int
    optimizer: DPOptimizer
    rows_per_unit: int
    prefetch: int

    def __iter__(self) -> Iterator[list[int]]:
        for indices in self.batches:
            units = np.asarray(indices, dtype=np.int64).reshape(-1, self.rows_per_unit)
            pieces = np.array_split(units, max(1, -(-len(units) // self.n_units)))
            for number, piece in enumerate(pieces):
                self._check_signals()
                self.optimizer.signal_skip_step(do_skip=number < len(pieces) - 1)
                yield piece.ravel().tolist()

    def _check_signals(self) -> None:
        ahead = self.prefetch + held_back(self, self.prefetch)
        if len(getattr(self.optimizer, "_step_skip_queue", ())) > ahead:
            raise PrivacyError(
                "a physical batch was not followed by step(), so that records of two logical "
                "batches would get into one sum: call step() after each, and discard() before a "
                "loop that begins anew"
            )

    def __len__(self) -> int:
        batch_size = getattr(self.batches, "batch_size", None) or self.n_units
        return len(self.batches) * -(-batch_size // self.n_units)
