"""Peaks against closed forms and the profiler, and batch sizes against brute force."""

import gc
import weakref

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode, _get_current_dispatch_mode
from torch.utils.checkpoint import checkpoint

from dpengine.execution.memory import largest_batch, peak_bytes

CPU = torch.device("cpu")


def peak(run) -> int:
    return peak_bytes(run, CPU)


@pytest.fixture(autouse=True, scope="module")
def few_objects():
    """A collection before each run need not look at what the imports made."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


def floats(n: int) -> torch.Tensor:
    return torch.empty(n)


def held_together():
    x, y = floats(100), floats(50)
    return x, y


def freed_between():
    x = floats(100)
    del x
    return floats(50)


def chain():
    """Two links are alive at a time: each operator needs its input."""
    x = floats(100)
    for _ in range(5):
        x = x * 2
    return x


def views():
    x = floats(100)
    return x.view(10, 10).t()[1:, ::2].detach().unsqueeze(0), x[None].expand(9, -1)


def a_view_keeps_its_base():
    row = floats(100)[:1]
    return row, floats(10)


def in_place():
    x = floats(100).zero_().add_(1).mul_(x_from_before)
    x[50:].copy_(x[:50])
    return torch.add(x, 1, out=x)


def grown():
    return floats(10).resize_(100), torch.mul(x_from_before, 2, out=floats(0))


def several_results():
    return torch.sort(torch.zeros(100))


def out_of_python():
    return torch.tensor([1.0, 2.0, 3.0])


def passed_through():
    return x_from_before.view(4, 25).add_(1), [x_from_before.t() for _ in range(3)]


x_from_before = torch.ones(100)


@pytest.mark.parametrize(
    ("run", "size"),
    [
        (held_together, 600),
        (freed_between, 400),
        (chain, 800),
        (views, 400),
        (a_view_keeps_its_base, 440),
        (in_place, 400),
        (grown, 800),
        (several_results, 400 + 400 + 800),  # zeros, their sorted copy, int64 indices
        (out_of_python, 12),
        (passed_through, 0),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_peak_of_known_allocations(run, size):
    assert peak(run) == size
    assert peak(run) == size


def test_memory_from_before_counts_only_what_is_added():
    x = torch.ones(10)
    assert peak(lambda: x.resize_(100)) == 4 * 90


@pytest.mark.parametrize(("rows", "width"), [(8, 4), (1, 4), (64, 2)])
def test_peak_of_a_matmul_chain_with_its_saved_tensors(rows, width):
    """y1 = x w1, y2 = y1 w2, y3 = y2 w3, loss = sum(y3); S bytes a result, W bytes a weight.

    Forward ends with y1, y2, y3 and the loss. The call holds the loss and its gradient, 8 bytes,
    during backward, where a node's saved tensor goes after the node:
    node 3: y1, y2, ∂y2, ∂w3. Node 2: y1, ∂y2, ∂w3, ∂y1, ∂w2. Node 1: ∂w3, ∂w2, ∂y1, ∂w1.
    """
    x = torch.ones(rows, width)
    weights = [torch.ones(width, width, requires_grad=True) for _ in range(3)]

    def step():
        for weight in weights:
            weight.grad = None
        (x @ weights[0] @ weights[1] @ weights[2]).sum().backward()

    s, w = 4 * rows * width, 4 * width * width
    expected = max(3 * s + 4, 3 * s + w + 8, 3 * s + 2 * w + 8, s + 3 * w + 8)
    assert [peak(step) for _ in range(3)] == [expected] * 3


@pytest.mark.parametrize(("blocks", "depth"), [(3, 5), (6, 2)])
def test_peak_under_activation_checkpointing(blocks, depth):
    """exp saves its result. Backward of a plain chain of B·m: the saved results left, an incoming
    gradient and a new one, (B·m + 1) S. With checkpoints, in the last block: the results of the
    B - 1 others, m recomputed ones and the gradient, (B + m) S; each block before it holds one
    result less and one gradient more. And 8 bytes for the loss and its gradient."""
    x = torch.full((50,), -9.0, requires_grad=True)

    def block(y):
        for _ in range(depth):
            y = torch.exp(y)
        return y

    def step(checkpointed: bool):
        x.grad = None
        y = x
        for _ in range(blocks):
            if checkpointed:
                y = checkpoint(block, y, use_reentrant=False, preserve_rng_state=False)
            else:
                y = block(y)
        loss = y.sum()
        del y
        loss.backward()

    assert peak(lambda: step(False)) == 200 * (blocks * depth + 1) + 8
    assert peak(lambda: step(True)) == 200 * (blocks + depth) + 8


def test_an_exception_leaves_no_trace():
    kept = []

    def fails():
        kept.append(floats(100))
        floats(1000).requires_grad_().square().sum().backward()
        raise KeyError("inside")

    with pytest.raises(KeyError, match="inside"):
        peak(fails)
    assert _get_current_dispatch_mode() is None
    assert all(weakref.getweakrefcount(x.untyped_storage()) == 0 for x in kept)
    kept.clear()
    assert peak(held_together) == 600


def test_what_no_counter_sees_is_refused():
    with pytest.raises(ValueError, match="device must be a CPU or a CUDA device, got meta"):
        peak_bytes(held_together, torch.device("meta"))
    with pytest.raises(NotImplementedError):
        peak(lambda: torch.eye(3).to_sparse())


class OperatorNames(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.add(func._schema.name)
        return func(*args, **(kwargs or {}))


def allocator_events(run, operators: set[str]) -> list[tuple[int, int, bool]]:
    """(time, bytes, temporary) of PyTorch's CPU allocator, by the profiler.

    An allocation is temporary if one of ``operators`` made it and freed it again.
    """
    gc.collect()
    with torch.profiler.profile(profile_memory=True) as profiler:
        run()
    events = []

    def walk(event, inside: frozenset[int]) -> None:
        fields = event.extra_fields
        if event.tag == torch._C._profiler._EventType.Allocation:
            events.append((event.start_time_ns, fields.alloc_size, fields.ptr, inside))
        elif event.name in operators:
            inside = inside | {event.id}
        for child in event.children:
            walk(child, inside)

    for root in profiler.profiler.kineto_results.experimental_event_tree():
        walk(root, frozenset())
    events.sort(key=lambda event: event[0])
    opened, temporary = {}, set()
    for index, (_, size, pointer, inside) in enumerate(events):
        if size > 0:
            opened[pointer] = index
        elif (made := opened.pop(pointer, None)) is not None and events[made][3] & inside:
            temporary |= {made, index}
    return [(time, size, i in temporary) for i, (time, size, *_) in enumerate(events)]


def running_peak(sizes) -> int:
    live = most = 0
    for size in sizes:
        live += size
        most = max(most, live)
    return most


@pytest.fixture
def train():
    """``train(n)``: one AdamW step of a UNet2DModel on n synthetic records."""
    from diffusers import UNet2DModel

    with torch.random.fork_rng():
        torch.manual_seed(0)
        unet = UNet2DModel(
            sample_size=8,
            in_channels=3,
            out_channels=3,
            layers_per_block=1,
            block_out_channels=(16, 32),
            norm_num_groups=8,
            down_block_types=("DownBlock2D", "AttnDownBlock2D"),
            up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        ).train()
    optimizer = torch.optim.AdamW(unet.parameters())

    def step(n: int) -> None:
        optimizer.zero_grad()
        images = torch.randn(n, 3, 8, 8, generator=torch.Generator().manual_seed(0))
        (unet(images, 10).sample - images).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    step.unet, step.optimizer = unet, optimizer
    return step


@pytest.mark.parametrize("checkpointing", [False, True])
def test_peak_of_a_unet_step_agrees_with_the_allocators_own_events(train, checkpointing):
    """They differ by temporaries inside an operator, by what it returns to C++ code that drops it
    at once, and by Python numbers that C++ wraps as tensors: at most 1%."""
    if checkpointing:
        train.unet.enable_gradient_checkpointing()
    with OperatorNames() as seen:
        train(1)  # makes the optimizer's state as well
    events = allocator_events(lambda: train(24), seen.names)
    counted = peak(lambda: train(24))
    visible = running_peak(size for _, size, temporary in events if not temporary)
    assert counted <= visible <= 1.01 * counted
    assert counted <= running_peak(size for _, size, _ in events)
    assert peak(lambda: train(24)) == counted


def test_a_fake_step_needs_as_much_as_a_real_one():
    from torch._subclasses.fake_tensor import FakeTensorMode

    def step():
        layer = torch.nn.Linear(100, 100)
        layer(torch.ones(7, 100)).square().sum().backward()

    with FakeTensorMode():
        fake = peak(step)
    assert fake == peak(step) > 40_000


def largest(run, max_bytes: int, at_most: int = 1000, **options) -> int:
    return largest_batch(run, max_bytes, CPU, at_most=at_most, **options)


def brute_force(peak_of, max_bytes: int, at_most: int, multiple: int) -> int:
    allowed = (n for n in range(1, at_most + 1) if n < multiple or n % multiple == 0)
    return max(n for n in allowed if peak_of(n) <= max_bytes)


class Affine:
    """A step that needs ``fixed + each * n`` bytes."""

    def __init__(self, fixed: int, each: int) -> None:
        self.fixed, self.each, self.runs = fixed, each, []

    def __call__(self, n: int):
        self.runs.append(n)
        return bytes_of(self.fixed), bytes_of(self.each * n)


def bytes_of(n: int) -> torch.Tensor:
    return torch.empty(n, dtype=torch.uint8)


@pytest.mark.parametrize(
    ("max_bytes", "expected"),
    [(1000 + 100 * 31 + 99, 24), (1000 + 100 * 32, 32), (1000 + 100 * 8 - 1, 7), (1100, 1)],
)
def test_an_affine_need_takes_two_dry_runs_and_one_that_confirms(max_bytes, expected):
    """And one before them, which leaves what stays: the optimizer's state."""
    run = Affine(1000, 100)
    assert largest(run, max_bytes) == expected
    assert run.runs == [1, 1, 2, expected][: 3 if expected == 1 else 4]


def test_a_far_prediction_is_approached():
    run = Affine(0, 10)
    assert largest(run, 10 * 500) == 496
    assert run.runs == [1, 1, 2, 32, 496]


@pytest.mark.parametrize(("at_most", "expected"), [(1, 1), (2, 2), (5, 5), (8, 8), (20, 16)])
def test_the_batch_is_never_larger_than_the_public_one(at_most, expected):
    run = Affine(1000, 100)
    assert largest(run, 10**6, at_most) == expected
    assert max(run.runs) == expected


@settings(deadline=None, max_examples=30)
@given(
    pieces=st.lists(st.tuples(st.integers(0, 9000), st.integers(0, 300)), min_size=1, max_size=4),
    spare=st.integers(0, 20_000),
    at_most=st.integers(1, 200),
    multiple=st.integers(1, 9),
)
def test_the_largest_size_that_fits_is_found_for_every_convex_need(
    pieces, spare, at_most, multiple
):
    """The peak of a step whose moments need fixed + each * n bytes is the largest of them."""

    def peak_of(n: int) -> int:
        return max(fixed + each * n for fixed, each in pieces)

    def run(n: int) -> None:
        for fixed, each in pieces:
            bytes_of(fixed + each * n)

    max_bytes = max(1, peak_of(1) + spare)
    found = largest(run, max_bytes, at_most, multiple=multiple)
    assert found == brute_force(peak_of, max_bytes, at_most, multiple)


def test_a_need_that_grows_faster_is_shrunk_until_it_fits():
    sizes = []

    def run(n: int):
        sizes.append(n)
        return bytes_of(n * n)

    assert largest(run, 50**2) == 48
    assert len(sizes) <= 10


@pytest.mark.parametrize("budget", [2000, 3000, 9000, 40_000])
def test_whatever_the_need_the_result_was_run_and_did_fit(budget):
    """Not convex, so the prediction may be too small; it is never too large."""

    def need(n: int) -> int:
        return int(1000 * n**0.5) + 700 * (n % 3)

    assert need(largest(lambda n: bytes_of(need(n)), budget)) <= budget


def test_a_run_above_the_budget_is_stopped_where_it_exceeds_it():
    reached = []

    def run(n: int):
        first = bytes_of(n * n)
        reached.append((n, "first"))
        return first, bytes_of(100 * n)

    assert largest(run, 30_000) == 128
    assert max(n for n, _ in reached) < 1000
    assert all(n * n <= 30_000 for n, _ in reached)


def test_what_stays_after_the_first_step_and_what_was_there_is_part_of_the_need():
    weights = bytes_of(5000)
    state = []

    def run(n: int):
        activations = bytes_of(100 * n)
        if not state:
            state.append(bytes_of(3000))
        return activations

    budget = 5000 + 3000 + 100 * 40
    assert largest(run, budget, resident=[weights, weights.view(50, 100)]) == 40


def test_garbage_of_one_run_is_not_part_of_the_next_ones_need():
    def run(n: int):
        cycle = [bytes_of(100 * n)]
        cycle.append(cycle)

    assert largest(run, 100 * 64, at_most=64) == 64


def test_a_budget_below_one_record_is_refused():
    weights = bytes_of(1_000_000)
    with pytest.raises(ValueError) as refused:
        largest(Affine(1000, 234), 1_001_000, resident=[weights])
    message = str(refused.value)
    assert "max_memory must hold the training step of one record" in message
    assert "needs 1,001,234 bytes, got 1,001,000; raise max_memory" in message


@pytest.mark.parametrize("name", ["max_bytes", "at_most", "multiple"])
def test_arguments_are_whole_numbers(name):
    arguments = {"max_bytes": 10, "at_most": 10, "multiple": 8} | {name: 0}
    with pytest.raises(ValueError, match=f"{name} must be a whole number of at least 1"):
        largest_batch(Affine(0, 1), device=CPU, **arguments)


@pytest.mark.parametrize("slots", [24, *(pytest.param(n, marks=pytest.mark.slow) for n in (8, 40))])
def test_the_batch_of_a_unet_fits_and_the_next_one_does_not(train, slots):
    """The optimizer step needs most at one record, activations above: the need is not affine."""
    train(1)
    state = [x for s in train.optimizer.state.values() for x in s.values()]
    resident = [*train.unet.parameters(), *state]
    size = sum(x.numel() * x.element_size() for x in resident)
    needs = [size + peak(lambda n=n: train(n)) for n in (slots, slots + 8)]
    assert largest(train, needs[0], resident=resident) == slots
    assert largest(train, needs[1] - 1, resident=resident) == slots
    assert largest(train, needs[1], resident=resident) == slots + 8
    assert largest(train, needs[1], at_most=slots, resident=resident) == slots


class Allocator:
    """Stands in for CUDA's: counters that a step moves, and a capacity."""

    def __init__(self, monkeypatch, resident: int, capacity: int) -> None:
        self.resident = self.most = resident
        self.capacity = capacity
        calls = {
            "memory_allocated": lambda device: self.resident,
            "max_memory_allocated": lambda device: self.most,
            "reset_peak_memory_stats": lambda device: setattr(self, "most", self.resident),
            "synchronize": lambda device: None,
            "empty_cache": lambda: None,
        }
        for name, call in calls.items():
            monkeypatch.setattr(torch.cuda, name, call)

    def take(self, size: int) -> None:
        if self.resident + size > self.capacity:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory")
        self.most = max(self.most, self.resident + size)


CUDA = torch.device("cuda")


def test_on_cuda_the_allocator_is_asked(monkeypatch):
    allocator = Allocator(monkeypatch, resident=500, capacity=10**6)
    allocator.take(7000)
    assert peak_bytes(lambda: allocator.take(123), CUDA) == 123
    budget = 500 + 300 + 10 * 70
    assert largest_batch(lambda n: allocator.take(300 + 10 * n), budget, CUDA, at_most=99) == 64


def test_on_cuda_out_of_memory_means_that_it_does_not_fit(monkeypatch):
    allocator = Allocator(monkeypatch, resident=0, capacity=60**2)
    sizes = []

    def run(n: int):
        sizes.append(n)
        allocator.take(n * n)

    assert largest_batch(run, 10**9, CUDA, at_most=10**6) == 56
    # 1, 1, 2, 32, 512, and the 60 multiples between the last two by halves.
    assert len(sizes) <= 5 + 6
    with pytest.raises(ValueError, match="one record, which needs more than the device has, got"):
        largest_batch(lambda n: allocator.take(10**5), 10**9, CUDA, at_most=8)


def test_garbage_is_collected_before_a_run_on_cuda(monkeypatch):
    allocator = Allocator(monkeypatch, resident=0, capacity=10**9)

    def change(size: int) -> None:
        allocator.resident += size

    def run(n: int):
        garbage = Affine(0, 0)
        garbage.itself = garbage
        change(100 * n)
        weakref.finalize(garbage, change, -100 * n)
        allocator.take(0)

    assert largest_batch(run, 100 * 64, CUDA, at_most=64) == 64


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_peak_on_a_cuda_device():
    """The caching allocator rounds to 512 bytes."""

    def run():
        x = torch.empty(1000, device="cuda")
        return x, torch.empty(256, device="cuda")

    assert peak_bytes(run, CUDA) == 4096 + 1024

    def step(n: int):
        return torch.empty(n, 2**20, dtype=torch.uint8, device="cuda")

    budget = torch.cuda.memory_allocated() + 35 * 2**20
    assert largest_batch(step, budget, CUDA, at_most=1000) == 32
