"""Logical batches larger than memory: Opacus' ``BatchMemoryManager``."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

import numpy as np
from torch.utils.data import DataLoader

from ..errors import positive_int
from ..optimizer import DPOptimizer
from .loader import DPDataLoader, IndexBatches, settings


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
        if isinstance(batches, IndexBatches):
            rows = 1 if batches.rate is None else batches.rate.rows_per_unit
            n_units = max(1, self.max_physical_batch_size // rows)
            batches = replace(batches, physical_batch_size=n_units)
            return DPDataLoader(self.data_loader.dataset, batches=batches, **how)
        batches = _Signalled(batches, self.max_physical_batch_size, self.optimizer)
        how["collate_fn"] = self.data_loader.collate_fn
        return DataLoader(self.data_loader.dataset, batch_sampler=batches, **how)

    def __exit__(self, *exception: object) -> None:
        """Nothing is to be undone."""


@dataclass(frozen=True, eq=False)
class _Signalled:
    """The batches of a sampler in pieces; the optimizer is told which of them are not the last."""

    batches: Iterable[list[int]]
    max_physical_batch_size: int
    optimizer: DPOptimizer

    def __iter__(self) -> Iterator[list[int]]:
        for indices in self.batches:
            n_pieces = max(1, -(-len(indices) // self.max_physical_batch_size))
            pieces = np.array_split(np.asarray(indices, dtype=np.int64), n_pieces)
            for number, piece in enumerate(pieces):
                self.optimizer.signal_skip_step(do_skip=number < n_pieces - 1)
                yield piece.tolist()

    def __len__(self) -> int:
        batch_size = getattr(self.batches, "batch_size", None) or self.max_physical_batch_size
        return len(self.batches) * -(-batch_size // self.max_physical_batch_size)
