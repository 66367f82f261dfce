"""Loaders whose batches are drawn, charged and announced by our samplers."""

import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import chain, islice
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_map
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    default_collate,
)

from ..capture import Capture
from ..errors import PrivacyError, positive_int, probability
from ..mechanism.batches import BatchNotice, PhysicalBatch
from ..mechanism.plan import Unit
from ..mechanism.sampling import CallAtEnd, OnePass, PoissonSampler
from ..mechanism.units import number_units
from .accountant import Budget


@dataclass(frozen=True)
class Rate:
    """How batches are drawn: each unit with probability ``sampling_rate``, M rows of each."""

    sampling_rate: float
    unit: Unit = "record"
    rows_per_unit: int = 1

    @property
    def num_steps(self) -> int:
        """Logical batches of a pass, 1/q, in which each unit is expected once."""
        return max(1, int(np.ceil(1 / self.sampling_rate - 1e-9)))


@dataclass(frozen=True, eq=False)
class IndexBatches:
    """The batches of one sampler as lists of indices, what a DataLoader takes as `batch_sampler`.

    rate: of Poisson sampling; or order: batches of the caller's own, each record once in a pass
    where ``is_distinct``.
    expected_batch_size: public, for ``len``. physical_batch_size: the most units at once, None for
    whole logical batches; pad: all batches of that size. budget: charged before anything is drawn;
    a pass ends early where it ends. capture: is told of each batch; prefetch: how many batches the
    loader's workers ask for ahead.
    """

    n_records: int = field(repr=False)
    expected_batch_size: float
    rate: Rate | None = None
    order: Iterable[list[int]] | None = field(default=None, repr=False)
    is_distinct: bool = True
    unit_ids: np.ndarray | None = field(default=None, repr=False)
    physical_batch_size: int | None = None
    pad: bool = False
    budget: Budget | None = None
    capture: Capture | None = field(default=None, repr=False)
    prefetch: int = 0

    def __iter__(self) -> Iterator[list[int]]:
        self._refuse_evaluation()
        of_pass = None if self.capture is None else self.capture.announcements.begin_pass()
        announce = partial(self._announce, of_pass)
        batches = CallAtEnd(iter(self._sampler(announce)), partial(self._past_the_end, announce))
        return map(lambda batch: batch.indices.ravel().tolist(), batches)

    def __len__(self) -> int:
        """Logical batches of a pass, or how many physical ones are expected; both are public."""
        n_batches = self.rate.num_steps if self.rate is not None else len(self.order)
        if self.physical_batch_size is None:
            return n_batches
        return n_batches * max(1, int(np.ceil(self.expected_batch_size / self.physical_batch_size)))

    def _sampler(self, announce: Callable[..., None]) -> Iterable[PhysicalBatch]:
        num_steps, reserve = self.rate and self.rate.num_steps, lambda: None
        if self.budget is not None:
            reserve = self.budget.reserve
            num_steps = num_steps and max(1, min(num_steps, self.budget.remaining))
        how = {"reserve": reserve, "announce": announce, "pad": self.pad}
        if self.rate is None:
            return OnePass(
                self.order,
                self.n_records,
                physical_batch_size=self.physical_batch_size,
                is_distinct=self.is_distinct,
                **how,
            )
        return PoissonSampler(
            self.n_records,
            self.rate,
            num_steps=num_steps,
            physical_batch_size=self.physical_batch_size or self.n_records,
            unit_ids=self.unit_ids,
            **how,
        )

    def _refuse_evaluation(self) -> None:
        """Raise PrivacyError, with nothing charged, where what is drawn could not be trained on."""
        # Eval mode alone tells nothing: transformers' Trainer calls train() after the first draw.
        if self.capture is not None and not torch.is_grad_enabled():
            raise PrivacyError(
                "a pass over the private loader is charged and must be trained on, and gradients "
                "are disabled; nothing was charged: to evaluate or to compute latents take a "
                "DataLoader of your own over the data"
            )

    def _announce(self, of_pass: int | None, notice: BatchNotice | None) -> None:
        if self.capture is not None:
            if notice is not None and self.budget is not None:
                notice = replace(notice, charged=self.budget.mechanism.noise_multiplier)
            ahead = partial(held_back, self, self.prefetch)
            self.capture.announcements.announce(notice, self.prefetch, ahead, of_pass)

    def _past_the_end(self, announce: Callable[..., None]) -> None:
        if self.prefetch > 0 or held_back(self, self.prefetch) > 0:
            announce(None)


@dataclass(frozen=True)
class Collate:
    """``collate_fn`` for batches that may be empty or are to have a constant size.

    n_rows: rows of every batch, None for as many as there are. Missing rows are zeros in the shape
    of the first record; their gradients are dropped. An empty batch gets ``n_rows_if_empty`` of
    them, or, where that is 0, has no rows. has_draws: the module is given several rows of a record.

    Raises PrivacyError where rows get the length of the longest record of the batch, and where
    ``has_draws`` and those of one record are not next to each other.
    """

    collate_fn: Callable[[list], Any]
    dataset: Dataset = field(repr=False)
    n_rows: int | None = None
    n_rows_if_empty: int = 0
    has_draws: bool = False

    def __call__(self, records: list) -> Any:
        n_rows = self.n_rows or (len(records) or self.n_rows_if_empty)
        if n_rows == 0:
            return _without_rows(self.collate_fn([self.dataset[0]]))
        if missing := n_rows - len(records):
            padding = tree_map(_zeros, self.dataset[0])
            records = [*records, *[padding] * missing]
        batch = self.collate_fn(records)
        if len(records) > 1 and self.collate_fn is not default_collate:  # which cannot pad
            self._refuse_mixing(records, batch)
        return batch

    def _refuse_mixing(self, records: list, batch: Any) -> None:
        # Padding reaches what is computed for a row unless every part masks it, and would let one
        # long record change the gradients of all others.
        for number, record in enumerate(records):
            alone = self.collate_fn([record])
            place = partial(_in_order, number, len(records))
            is_fixed = self.has_draws and _fit(alone, self.collate_fn([record]), torch.equal)
            if is_fixed and not _fit(batch, alone, place):
                raise PrivacyError(
                    "collate_fn puts the rows of one record apart, as [instances, class images]: "
                    "row n * K + k must be record n's, and public images' loss is for the "
                    "optimizer's attach_public_loss"
                )
            if not _fit(batch, alone, partial(_same_lengths, len(records))):
                raise PrivacyError(
                    "collate_fn gives the rows of a batch the length of its longest record, which "
                    "lets one record change the gradients of the others: pad or cut each to one "
                    "constant length, as tokenizer(text, padding='max_length', max_length=77, "
                    "truncation=True) does"
                )


class DPDataLoader(DataLoader):
    """A DataLoader with Poisson sampling: each record enters a batch with ``sample_rate``.

    The coins are secret, fresh and 64 bits wide; there is no ``generator`` to seed them. ``len`` is
    1 / sample_rate. Batches vary in size and may be empty; ``make_private`` makes a loader whose
    batches are charged and announced, and in which an empty one has a row of zeros.

    unit_ids, rows_per_unit: as in ``PoissonSampler``; a batch then holds all rows of its units.
    static_batch: the number of units of every batch, padded with zeros; logical batches are cut.
    batches: the ``IndexBatches`` to use instead of ``sample_rate``.

    collate_fn: must give every record rows of one constant length, beside whichever others.

    Other arguments are those of torch's DataLoader.
    """

    def __init__(
        self,
        dataset: Dataset,
        *,
        sample_rate: float | None = None,
        collate_fn: Callable[[list], Any] | None = None,
        drop_last: bool = False,
        generator: None = None,
        distributed: Literal[False] = False,
        batch_first: Literal[True] = True,
        rand_on_empty: Literal[False] = False,
        unit_ids: np.ndarray | None = None,
        rows_per_unit: int = 1,
        static_batch: int | None = None,
        batches: IndexBatches | None = None,
        **kwargs: Any,
    ) -> None:
        refuse(generator, distributed, batch_first, rand_on_empty)
        if isinstance(dataset, IterableDataset):
            raise TypeError("dataset must be indexed by number, so that each record has its coin")
        if batches is None:
            probability(sample_rate=sample_rate)
            unit = "record" if unit_ids is None else "unit"
            n_units = len(dataset) if unit_ids is None else int(number_units(unit_ids).max()) + 1
            batches = IndexBatches(
                len(dataset),
                sample_rate * n_units,
                rate=Rate(sample_rate, unit, rows_per_unit),
                unit_ids=unit_ids,
                physical_batch_size=static_batch,
                pad=static_batch is not None,
            )
        self.sample_rate = None if batches.rate is None else batches.rate.sampling_rate
        rows = 1 if batches.rate is None else batches.rate.rows_per_unit
        super().__init__(
            dataset,
            batch_sampler=batches,
            collate_fn=Collate(
                collate_fn or default_collate,
                dataset,
                n_rows=batches.physical_batch_size * rows if batches.pad else None,
                n_rows_if_empty=rows if batches.capture is not None else 0,
                has_draws=batches.capture is not None and batches.capture.draws_per_record > rows,
            ),
            **kwargs,
        )

    @classmethod
    def from_data_loader(cls, data_loader: DataLoader, **how: Any) -> "DPDataLoader":
        """A loader of the same data and workers; ``how`` as for the class.

        Without ``sample_rate`` it is batch_size / len(dataset), which makes the size of the data
        public. The order, `drop_last` and the generator of ``data_loader`` are given up; one that
        leaves records out is refused with ValueError.
        """
        if "batches" not in how:
            refuse_left_out(data_loader)
        if "batches" not in how and how.get("sample_rate") is None:
            how["sample_rate"] = public_batch_size(data_loader) / len(data_loader.dataset)
            check_derived(how["sample_rate"])
        return cls(data_loader.dataset, **(settings(data_loader) | how))


def settings(data_loader: DataLoader) -> dict[str, Any]:
    """What a loader with other batches takes over from ``data_loader``."""
    names = (
        "num_workers pin_memory timeout worker_init_fn multiprocessing_context prefetch_factor "
        "persistent_workers"
    )
    collate_fn = data_loader.collate_fn
    if isinstance(collate_fn, Collate):
        collate_fn = collate_fn.collate_fn
    return {name: getattr(data_loader, name) for name in names.split()} | {"collate_fn": collate_fn}


def lookahead(data_loader: DataLoader) -> int:
    """How many batches the workers of ``data_loader`` ask for ahead of the one at work."""
    return data_loader.num_workers * (data_loader.prefetch_factor or 0)


def held_back(batches: object, prefetch: int) -> int:
    """How many of ``batches`` a loader of accelerate's holds back: one, to see the end.

    Where workers are ahead, it sees the end without asking the sampler again.
    """
    state = sys.modules.get("accelerate.state")
    loaders = [] if state is None else state.GradientState().dataloader_references
    # Not the active one alone: a loader for evaluation that was left early stays active.
    mine = [loader for loader in loaders if getattr(loader, "batch_sampler", None) is batches]
    return int(bool(mine) and not (mine[-1].end_of_dataloader and prefetch > 0))


def public_batch_size(data_loader: DataLoader) -> int:
    """The batch size that the caller has set, a public constant."""
    batch_size = data_loader.batch_size or getattr(data_loader.batch_sampler, "batch_size", None)
    if batch_size is None:
        raise ValueError(
            "the data_loader must have a batch_size, the expected size of a batch and the divisor; "
            "give it one"
        )
    positive_int(batch_size=batch_size)
    return batch_size


def check_derived(rate: float) -> None:
    """Raise ValueError where a batch_size over a number of units is no probability."""
    if rate > 1:
        raise ValueError(
            "batch_size must be at most the number of records, or of persons where unit_ids are "
            "given, as each enters a batch with probability batch_size over their number: make it "
            "smaller, or give sample_rate, at most 1"
        )


def refuse_left_out(data_loader: DataLoader) -> None:
    """Raise ValueError where the order of ``data_loader`` leaves records of its dataset out.

    Poisson sampling gives up that order and draws from all records, so that those held out would be
    trained on. A sampler that is not torch's own is read once.
    """
    order, n_records = data_loader.batch_sampler, len(data_loader.dataset)
    if isinstance(order, IndexBatches):
        order = order.order
    if order is None:
        return
    sampler = order.sampler if type(order) is BatchSampler else None
    if type(sampler) in (SequentialSampler, RandomSampler):
        is_whole = len(sampler.data_source) == n_records
    else:
        drawn = chain.from_iterable(order) if sampler is None else iter(sampler)
        is_whole = set(map(int, islice(drawn, 2 * n_records))) == set(range(n_records))
    if not is_whole:
        raise ValueError(
            "data_loader has a sampler that leaves records out, and Poisson sampling would draw "
            "them: leave the sampler out, and give torch.utils.data.Subset(dataset, indices) as "
            "the dataset; or keep the order with poisson_sampling=False"
        )


def refuse(generator: object, distributed: bool, batch_first: bool, rand_on_empty: bool) -> None:
    """Raise ValueError for arguments of Opacus that have no sound meaning here."""
    if generator is not None:
        raise ValueError("generator must be None: coins must be secret; leave it out")
    if distributed:
        raise ValueError("distributed must be False: private training runs in one process")
    if not batch_first:
        raise ValueError("batch_first must be True: let the first axis of each tensor count rows")
    if rand_on_empty:
        raise ValueError(
            "rand_on_empty must be False: an empty batch comes as a row of zeros whose gradient is "
            "dropped; leave it out"
        )


def _zeros(leaf: Any) -> Any:
    if isinstance(leaf, Tensor):
        return leaf.new_zeros(leaf.shape)
    if isinstance(leaf, np.ndarray):
        return np.zeros_like(leaf)
    if isinstance(leaf, np.number | np.bool_ | int | float | complex):
        return type(leaf)(0)
    return leaf  # a text, an image: its row is dropped like the others


def _fit(batch: Any, alone: Any, check: Callable[[Tensor, Tensor], bool]) -> bool:
    """Whether all tensors of ``batch`` pass ``check`` beside those of one record collated alone."""
    if isinstance(batch, Tensor | np.ndarray) and isinstance(alone, Tensor | np.ndarray):
        return check(torch.as_tensor(batch), torch.as_tensor(alone))
    if isinstance(batch, Mapping) and isinstance(alone, Mapping):
        return all(_fit(batch[name], alone[name], check) for name in alone)
    if isinstance(batch, list | tuple) and len(batch) == len(alone):
        return all(_fit(*pair, check) for pair in zip(batch, alone, strict=True))
    return True


def _same_lengths(n_records: int, batch: Tensor, alone: Tensor) -> bool:
    """Whether the rows of ``batch`` have the shape of that of one record."""
    has_rows = batch.ndim > 0 and len(batch) == n_records
    is_row = alone.ndim == batch.ndim and len(alone) == 1  # else one record is joined otherwise
    return not (has_rows and is_row) or batch.shape[1:] == alone.shape[1:]


def _in_order(number: int, n_records: int, batch: Tensor, alone: Tensor) -> bool:
    """Whether several rows of one record, if it has them, are where they belong."""
    if alone.ndim == 0 or batch.shape != (n_records * len(alone), *alone.shape[1:]):
        return True
    rows = batch[number * len(alone) : (number + 1) * len(alone)]
    return len(alone) == 1 or torch.equal(rows.nan_to_num(), alone.nan_to_num())


def _without_rows(batch: Any) -> Any:
    if isinstance(batch, Tensor):
        return batch[:0] if batch.ndim > 0 else batch
    if isinstance(batch, list | tuple) and all(isinstance(leaf, str | bytes) for leaf in batch):
        return type(batch)()  # one text for each row
    if isinstance(batch, Mapping):
        return {name: _without_rows(leaf) for name, leaf in batch.items()}
    if isinstance(batch, list):
        return [_without_rows(leaf) for leaf in batch]
    if isinstance(batch, tuple):
        leaves = map(_without_rows, batch)
        return type(batch)(*leaves) if hasattr(batch, "_fields") else tuple(leaves)
    return batch
