"""Peak memory of a training step, and the physical batch size that fits a budget.

Only synthetic rows of public shapes may be run here: then what is found is public.
"""

import gc
import math
import weakref
from bisect import bisect_right
from collections.abc import Callable, Iterable

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ..errors import positive_int

_REACH = 16
"""How far beyond the largest batch that was seen to fit a prediction is trusted."""

_Peak = Callable[[int, float], int]
"""Peak in bytes with so many records; may raise OutOfMemoryError above so many bytes."""


def peak_bytes(run: Callable[[], object], device: torch.device) -> int:
    """Most bytes of tensors that were alive at once during ``run()``, beyond those from before.

    CUDA: what the caching allocator handed out, workspaces of operators and its rounding to 512
    bytes included; its unused cache and the CUDA context are not. CPU: the storages that eager
    operators of this thread return, forward and backward, each once and as long as it lives;
    temporaries inside a single operator and arrays of other libraries are not seen, and memory
    from before that ``run`` frees is not credited. The same number again for the same shapes.
    Raises ValueError for any other device, NotImplementedError for tensors without a storage
    (sparse ones).
    """
    _check_device(device)
    if device.type == "cuda":
        gc.collect()
        before = torch.cuda.memory_allocated(device)
        return _allocator_peak(run, device) - before
    with _LiveBytes() as live:
        return live.peak_of(run)


def largest_batch(
    run: Callable[[int], object],
    max_bytes: int,
    device: torch.device,
    *,
    at_most: int,
    multiple: int = 8,
    resident: Iterable[Tensor] = (),
) -> int:
    """The largest number of records whose training step needs at most ``max_bytes`` in all.

    run: one training step with so many synthetic records. It must leave nothing behind whose
        size depends on that number, and start afresh after it was left by OutOfMemoryError.
    max_bytes: bounds the peak of all tensors, those alive before the step included, as
        ``peak_bytes`` counts them.
    at_most: largest result, the public expected batch size: more is never used.
    multiple: results above it are multiples of it, so that rounding is alike in every slot.
    resident: tensors alive before (parameters, buffers). On CUDA the allocator knows them.

    At every moment of a step the live bytes are affine in the number of records, so their peak is
    convex: the line through two sizes that fit lies below it beyond them. It is drawn through 1
    and 2 records, after a first step that leaves the optimizer's state, and the batch that it
    predicts is run, to be halved towards the last that fits as long as it does not. The result was
    run and did fit. A CPU run is stopped by OutOfMemoryError, as CUDA's, once above the budget.

    Raises ValueError where one record does not fit.
    """
    positive_int(max_bytes=max_bytes, at_most=at_most, multiple=multiple)
    _check_device(device)
    sizes = [*range(1, min(multiple, at_most + 1)), *range(multiple, at_most + 1, multiple)]
    if device.type == "cuda":
        return _search(lambda n, _: _allocator_peak(lambda: run(n), device), max_bytes, sizes)
    with _LiveBytes(resident) as live:
        # One counter for all runs: what a run leaves alive is part of the next one's need.
        return _search(
            lambda n, stop_above: live.peak_of(lambda: run(n), stop_above), max_bytes, sizes
        )


def _search(peak: _Peak, max_bytes: int, sizes: list[int]) -> int:
    def needed(n: int, stop_above: float = math.inf) -> float:
        try:
            return peak(n, stop_above)
        except torch.OutOfMemoryError:
            return math.inf

    needed(1)  # leaves what every later step finds, as the optimizer's state
    fits = [(1, needed(1))]
    if fits[0][1] > max_bytes:
        need = fits[0][1]
        size = f"{need:,} bytes" if need < math.inf else "more than the device has"
        raise ValueError(
            f"max_memory must hold the training step of one record, which needs {size}, got "
            f"{max_bytes:,}; raise max_memory, lower draws_per_record, or turn on activation "
            "checkpointing"
        )
    if len(sizes) == 1 or (two := needed(2)) > max_bytes:
        return 1
    fits.append((2, two))

    too_big = len(sizes)  # index of the smallest size that does not fit, seen or predicted
    failed = False
    while True:
        predicted = bisect_right(sizes, _extrapolate(*fits[-2:], max_bytes))
        halve = failed and predicted >= too_big
        too_big = min(too_big, predicted)
        best = sizes.index(fits[-1][0])
        if best + 1 >= too_big:
            return sizes[best]
        within_reach = bisect_right(sizes, max(_REACH * sizes[best], sizes[best + 1]))
        index = (best + too_big) // 2 if halve else min(too_big, within_reach) - 1
        need = needed(sizes[index], max_bytes)
        if need > max_bytes:
            too_big, failed = index, True
        else:
            fits.append((sizes[index], need))


def _extrapolate(left: tuple[int, int], right: tuple[int, int], max_bytes: int) -> float:
    """Where the line through two (records, bytes) points reaches ``max_bytes``."""
    rise = right[1] - left[1]
    if rise <= 0:
        return math.inf
    return right[0] + (max_bytes - right[1]) * (right[0] - left[0]) // rise


def _allocator_peak(run: Callable[[], object], device: torch.device) -> int:
    gc.collect()
    # A failed attempt leaves the cache in pieces of the wrong sizes.
    torch.cuda.empty_cache()
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    run()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device)


def _check_device(device: torch.device) -> None:
    if device.type not in ("cpu", "cuda"):
        raise ValueError(
            f"device must be a CPU or a CUDA device, got {device}; choose physical_batch_size "
            "there, without max_memory"
        )


class _LiveBytes(TorchDispatchMode):
    """Counts the bytes of the storages that operators return, for as long as they live.

    resident: tensors that are counted from the start.
    """

    def __init__(self, resident: Iterable[Tensor] = ()) -> None:
        super().__init__()
        self._current = self._peak = 0
        self._stop_above = math.inf
        # Address of a storage -> its weak reference, bytes that are not ours, bytes counted.
        self._alive: dict[int, tuple[weakref.ref, int, int]] = {}
        for storage in _storages(list(resident)).values():
            self._count(storage, 0)

    def peak_of(self, run: Callable[[], object], stop_above: float = math.inf) -> int:
        """Most bytes alive at once during ``run()``; OutOfMemoryError above ``stop_above``."""
        gc.collect()
        self._peak, self._stop_above = self._current, stop_above
        run()
        return self._peak

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        inputs = _storages((args, kwargs))
        sizes = {address: storage.nbytes() for address, storage in inputs.items()}
        result = func(*args, **(kwargs or {}))
        # `torch.tensor` makes its storage unseen and hands it to this operator.
        fresh = func is torch.ops.aten.lift_fresh.default
        # Views and in-place results own no storage; `resize_` and `out=` may enlarge an input.
        for address, storage in (inputs | _storages(result)).items():
            self._count(storage, 0 if fresh else sizes.get(address, 0))
        self._peak = max(self._peak, self._current)
        if self._current > self._stop_above:
            raise torch.OutOfMemoryError(f"more than {self._stop_above:,} bytes of tensors")
        return result

    def __exit__(self, *exception) -> None:
        super().__exit__(*exception)
        self._alive.clear()

    def _count(self, storage: torch.UntypedStorage, from_before: int) -> None:
        address, size = storage._cdata, storage.nbytes()
        if address in self._alive:
            reference, from_before, counted = self._alive[address]
        else:
            # The Python object of a storage lives as long as the storage, whoever holds it.
            reference, counted = weakref.ref(storage, lambda _: self._freed(address)), 0
        now = max(0, size - from_before)
        self._alive[address] = (reference, from_before, now)
        self._current += now - counted

    def _freed(self, address: int) -> None:
        self._current -= self._alive.pop(address)[2]


def _storages(tree: object) -> dict[int, torch.UntypedStorage]:
    """The CPU storages under a tree of arguments, by address."""
    tensors = [x for x in tree_leaves(tree) if isinstance(x, Tensor) and x.device.type == "cpu"]
    return {s._cdata: s for s in (tensor.untyped_storage() for tensor in tensors)}
