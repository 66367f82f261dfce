"""Logical batches larger than memory: Opacus' ``BatchMemoryManager``."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

import numpy as np
from torch.utils.data import DataLoader

from ..errors import PrivacyError, positive_int
from ..optimizer import DPOptimizer
from .loader import DPDataLoader, IndexBatches, held_back, lookahead, settings


@dataclass(frozen=True)
class BatchMemoryManager:
    """Cuts the batches of ``data_loader`` into physical ones of at most the given number of rows.

    ``with BatchMemoryManager(...) as loader`` gives the loader to iterate over. ``step()`` after
    each physical batch adds to the sum, and the last one of a logical batch is noised and applied.
    A loader of ``make_private`` announces where a logical batch ends; for any other the optimizer
    is told by ``signal_skip_step``. A person's rows stay together.
    """

    data_loader: DataLoader
    max_physical_batch_size: int
    optimizer: DPOptimizer

    def __post_init__(self) -> None:
        positive_int(max_physical_batch_size=self.max_physical_batch_size)

    def __enter__(self) -> DataLoader:
        batches = self.data_loader.batch_sampler
        how = settings(self.data_loader)
        rate = getattr(batches, "rate", None)
        rows = 1 if rate is None else rate.rows_per_unit
        if isinstance(batches, IndexBatches) and batches.capture is not None:
            n_units = max(1, self.max_physical_batch_size // rows)
            batches = replace(batches, physical_batch_size=n_units)
            return DPDataLoader(self.data_loader.dataset, batches=batches, **how)
        batches = _Signalled(
            batches,
            self.max_physical_batch_size,
            self.optimizer,
            rows_per_unit=rows,
            prefetch=lookahead(self.data_loader),
        )
        how["collate_fn"] = self.data_loader.collate_fn
        return DataLoader(self.data_loader.dataset, batch_sampler=batches, **how)

    def __exit__(self, *exception: object) -> None:
        """Nothing is to be undone."""


@dataclass(frozen=True, eq=False)
class _Signalled:
    """The batches of a sampler in pieces; the optimizer is told which of them are not the last.

    Raises PrivacyError where a piece was not followed by ``step``: its signal would go to another.
    """

    batches: Iterable[list[int]]
    max_physical_batch_size: int
    optimizer: DPOptimizer
    rows_per_unit: int
    prefetch: int

    def __iter__(self) -> Iterator[list[int]]:
        n_units = max(1, self.max_physical_batch_size // self.rows_per_unit)
        for indices in self.batches:
            units = np.asarray(indices, dtype=np.int64).reshape(-1, self.rows_per_unit)
            pieces = np.array_split(units, max(1, -(-len(units) // n_units)))
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
        batch_size = getattr(self.batches, "batch_size", None) or self.max_physical_batch_size
        return len(self.batches) * -(-batch_size // self.max_physical_batch_size)
