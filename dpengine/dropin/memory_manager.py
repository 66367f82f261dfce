"""Logical batches larger than memory: Opacus' ``BatchMemoryManager``."""

from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import numpy as np
from torch.utils.data import DataLoader

from ..capture import Capture
from ..errors import PrivacyError, positive_int
from ..optim import DPOptimizer
from .loader import DPDataLoader, IndexBatches, lookahead, settings


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
        self._exits: ExitStack | None = None

    def __enter__(self) -> DataLoader:
        if self._exits is not None:
            raise ValueError("a BatchMemoryManager is entered already; make another one")
        self._exits = ExitStack()
        batches = self.data_loader.batch_sampler
        rate = getattr(batches, "rate", None)
        rows = 1 if rate is None else rate.rows_per_unit
        n_units = max(1, self.max_physical_batch_size // rows)
        # accelerate wraps a DPOptimizer in one of its own.
        optimizer = getattr(self.optimizer, "optimizer", self.optimizer)
        source = optimizer.source
        if not isinstance(source, Capture):
            self._exits.callback(optimizer.discard)
            return _SignallingLoader(self.data_loader, n_units, rows, optimizer)
        if not isinstance(batches, IndexBatches):
            batches = IndexBatches(
                len(self.data_loader.dataset),
                getattr(batches, "batch_size", n_units),
                order=batches,
                is_distinct=False,
            )
        if not source.announcements.are_expected:
            source.announcements.expect()
            self._exits.callback(source.announcements.release)
        batches = replace(
            batches,
            physical_batch_size=n_units,
            capture=batches.capture or source,
            prefetch=lookahead(self.data_loader),
        )
        return DPDataLoader(self.data_loader.dataset, batches=batches, **settings(self.data_loader))

    def __exit__(self, *exception: object) -> None:
        exits, self._exits = self._exits, None
        exits.close()


class _SignallingLoader(DataLoader):
    """The batches of ``data_loader`` in pieces; the optimizer is told which are not the last.

    A pass begins a logical batch, whatever was summed before. Raises PrivacyError where a piece was
    not followed by ``step``, whose signal would go to another, or where a pass goes on after
    another had begun: its pieces could enter a sum of the other.
    """

    def __init__(
        self, data_loader: DataLoader, n_units: int, rows_per_unit: int, optimizer: DPOptimizer
    ) -> None:
        self._optimizer, self._lookahead = optimizer, lookahead(data_loader)
        super().__init__(
            data_loader.dataset,
            batch_sampler=_Pieces(
                data_loader.batch_sampler, n_units, rows_per_unit, self._lookahead
            ),
            **{**settings(data_loader), "collate_fn": data_loader.collate_fn},
        )

    def __iter__(self) -> Iterator[Any]:
        self._optimizer.discard()
        source = self._optimizer.source
        this_pass = source.begin_pass()
        for batch in super().__iter__():
            if source.current_pass != this_pass:
                raise PrivacyError(
                    "a pass over the loader went on after another had begun; use one at a time"
                )
            if self._optimizer._step_skip_queue:
                raise PrivacyError(
                    "a physical batch was not followed by step(), so that records of two logical "
                    "batches would get into one sum: call step() after each, and discard() to give "
                    "one up"
                )
            self._optimizer.signal_skip_step(do_skip=not self.batch_sampler.ends.popleft())
            yield batch


class _Pieces:
    """The batches of a sampler in pieces; ``ends`` has whether each one drawn is the last of its.

    Raises PrivacyError where more are drawn than the loader that reads ``ends`` would.
    """

    def __init__(
        self, batches: Iterable[list[int]], n_units: int, rows_per_unit: int, ahead: int
    ) -> None:
        self._batches, self._n_units, self._rows_per_unit = batches, n_units, rows_per_unit
        self._ahead = ahead
        self.ends: deque[bool] = deque()

    def __iter__(self) -> Iterator[list[int]]:
        self.ends = ends = deque()
        for indices in self._batches:
            units = np.asarray(indices, dtype=np.int64).reshape(-1, self._rows_per_unit)
            pieces = np.array_split(units, max(1, -(-len(units) // self._n_units)))
            for number, piece in enumerate(pieces):
                if len(ends) > self._ahead:
                    raise PrivacyError(
                        "the batches of a BatchMemoryManager were drawn past its loader: iterate "
                        "over the loader itself, which tells the optimizer where a logical batch "
                        "ends"
                    )
                ends.append(number == len(pieces) - 1)
                yield piece.ravel().tolist()

    def __len__(self) -> int:
        batch_size = getattr(self._batches, "batch_size", None) or self._n_units
        return len(self._batches) * -(-batch_size // self._n_units)
