"""A recorded pass gives what the eager one gives, and follows the same protocol."""

import copy
from collections import Counter
from contextlib import nullcontext

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from dpengine import Capture, DPOptimizer, PrivacyError
from dpengine.execution.passes import make_pass
from dpengine.mechanism.batches import BatchNotice
from dpengine.mechanism.private import Private

# The compiler's own, when torch first imports it.
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")

N, DRAWS, TOKENS, WIDTH, HIDDEN = 4, 2, 3, 8, 16
LAYERS = ("first", "second", "third")
C = 0.5


class Mlp(nn.Module):
    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.first = nn.Linear(WIDTH, hidden)
        self.second = nn.Linear(hidden, hidden)
        self.third = nn.Linear(hidden, WIDTH)

    def forward(self, x):
        return self.third(torch.tanh(self.second(torch.tanh(self.first(x)))))


def make_model(targets=("first", "second"), hidden: int = HIDDEN) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = LoraConfig(r=2, lora_alpha=3.0, target_modules=list(targets))
        model = inject_adapter_in_model(config, Mlp(hidden))
        for name, param in model.named_parameters():
            if "lora_B" in name:
                param.data.normal_(std=0.3)
    return model.train()


def batch(seed: int = 0, n_records: int = N) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shape = (n_records * DRAWS, TOKENS, WIDTH)
    return torch.randn(shape, generator=generator), torch.randn(shape, generator=generator)


def loss_of(model):
    return lambda x, target: (model(x) - target).square().flatten(1).mean(1).mean()


def captured(model=None, **options) -> Capture:
    return Capture(model or make_model(), draws_per_record=DRAWS, **options)


def optimizer_of(capture: Capture) -> DPOptimizer:
    return DPOptimizer(
        torch.optim.SGD(capture.parameters, lr=5.0, momentum=0.9),
        noise_multiplier=0.0,
        max_grad_norm=C,
        expected_batch_size=N,
    )


def distance(left, right) -> float:
    squares = [(a - b).detach().double().square().sum() for a, b in zip(left, right, strict=True)]
    return float(sum(squares)) ** 0.5


# ---- CUDA graphs on a machine without a GPU: operators are recorded and run again.


class FakeGraph:
    """What a CUDA graph is: the operators that ran, on the addresses on which they ran."""

    def __init__(self) -> None:
        self.calls: list[tuple] = []

    def replay(self) -> None:
        with torch.no_grad():
            for function, args, kwargs, result in self.calls:
                again = function(*args, **kwargs)
                for static, fresh in zip(tree_leaves(result), tree_leaves(again), strict=True):
                    if isinstance(fresh, torch.Tensor) and fresh.data_ptr() != static.data_ptr():
                        static.copy_(fresh)


class Record(TorchDispatchMode):
    def __init__(self, graph: FakeGraph) -> None:
        super().__init__()
        self.graph = graph

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        # The addresses alone, not autograd's view of the tensors that lie there.
        bare = tree_map_only(torch.Tensor, torch.Tensor.detach, (args, kwargs or {}, result))
        self.graph.calls.append((func, *bare))
        return result


class OnGpu(torch.Tensor):
    """A CPU tensor that says that it lies on a GPU."""

    __torch_function__ = torch._C._disabled_torch_function_impl

    @property
    def is_cuda(self) -> bool:
        return True


@pytest.fixture
def fake_cuda(monkeypatch):
    """Stands in for the parts of torch.cuda that a recording needs."""

    class Stream:
        def wait_stream(self, other) -> None:
            pass

    monkeypatch.setattr(torch.cuda, "CUDAGraph", FakeGraph)
    monkeypatch.setattr(torch.cuda, "graph", Record)
    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "stream", nullcontext)
    monkeypatch.setattr(torch.cuda, "current_stream", Stream)


def on_device(tensors, how: str):
    if how != "cuda-graph":
        return tensors
    first, *others = tensors
    return first.as_subclass(OnGpu), *others


RECORDED = ["inductor", "cuda-graph"]


@pytest.fixture(params=RECORDED)
def how(request):
    if request.param == "cuda-graph":
        if torch.cuda.is_available():
            pytest.skip("the stand-in is for machines without a GPU; see the test of the device")
        request.getfixturevalue("fake_cuda")
    return request.param


# ---- Same gradients


def test_the_gradients_are_those_of_the_eager_pass(how):
    model = make_model()
    twin = copy.deepcopy(model)
    eager, recorded = captured(model), captured(twin)
    run_eagerly = make_pass(eager, loss_of(model))
    run = make_pass(recorded, loss_of(twin), how)
    for seed in range(3):
        run_eagerly(*batch(seed))
        expected = eager.take()
        run(*on_device(batch(seed), how))
        got = recorded.take()
        assert got.n_rows == expected.n_rows == N * DRAWS
        pairs = zip(got.per_record_grads, expected.per_record_grads, strict=True)
        for ours, theirs in pairs:
            assert ours.shape == theirs.shape
            assert distance([ours], [theirs]) <= 1e-5 * float(theirs.double().norm()) != 0


def test_a_batch_may_name_its_tensors_and_keeps_its_names(how):
    """Two of one shape: in another order, one would be taken for the other."""
    model = make_model()
    twin = copy.deepcopy(model)
    eager, recorded = captured(model), captured(twin)

    def named(batch):
        return dict(zip(("x", "target"), batch, strict=True))

    make_pass(eager, loss_of(model))(*batch())
    loss = loss_of(twin)
    run = make_pass(recorded, lambda rows: loss(rows["x"], rows["target"]), how)
    rows = named(on_device(batch(), how))
    run(rows)
    expected, got = eager.take(), recorded.take()
    for ours, theirs in zip(got.per_record_grads, expected.per_record_grads, strict=True):
        assert distance([ours], [theirs]) <= 1e-5 * float(theirs.double().norm()) != 0
    with pytest.raises(ValueError, match="the names of its first call, in their order"):
        run(dict(reversed(rows.items())))


def test_updates_of_the_weights_are_followed(how):
    """Three optimizer steps with momentum, in place; baked-in weights would stay behind."""
    model = make_model()
    twin = copy.deepcopy(model)
    eager, recorded = captured(model), captured(twin)
    optimizers = optimizer_of(eager), optimizer_of(recorded)
    passes = make_pass(eager, loss_of(model)), make_pass(recorded, loss_of(twin), how)
    before = [param.detach().clone() for param in eager.parameters]
    for seed in range(3):
        passes[0](*batch(seed))
        passes[1](*on_device(batch(seed), how))
        for optimizer in optimizers:
            optimizer.step()
            assert not optimizer._is_last_step_skipped
            optimizer.zero_grad()
        moved = distance(eager.parameters, before)
        assert moved > 0.1
        assert distance(eager.parameters, recorded.parameters) <= 1e-5 * moved
    assert all(param.grad is None for param in recorded.parameters)


# ---- Same protocol


def test_a_second_pass_before_take_is_refused(how):
    model = make_model()
    capture = captured(model)
    run = make_pass(capture, loss_of(model), how)
    run(*on_device(batch(), how))
    with pytest.raises(PrivacyError, match="before step"):
        run(*on_device(batch(1), how))
    assert capture.take().n_rows == N * DRAWS
    with pytest.raises(PrivacyError, match="no per-record gradients"):
        capture.take()


def test_a_pass_takes_the_notice_of_its_batch_and_the_recording_none(how):
    model = make_model()
    capture = captured(model)
    run = make_pass(capture, loss_of(model), how)
    for n_records, last in ((3, False), (0, True)):
        capture.announcements.announce(
            BatchNotice(Private(n_records), N, is_first=not last, is_last=last)
        )
        run(*on_device(batch(), how))
        taken = capture.take()
        assert taken.is_record.tolist() == [n < n_records for n in range(N)]
        assert (taken.is_first, taken.is_last) == (not last, last)
    with pytest.raises(PrivacyError, match="did not announce"):
        run(*on_device(batch(), how))


def test_a_pass_is_not_recorded_inside_another(how):
    model = make_model()
    capture = captured(model)
    run = make_pass(capture, loss_of(model), how)
    model(batch()[0])
    with pytest.raises(PrivacyError, match="while a batch is being processed"):
        run(*on_device(batch(), how))


def test_other_shapes_and_types_are_refused(how):
    model = make_model()
    capture = captured(model)
    run = make_pass(capture, loss_of(model), how)
    run(*on_device(batch(), how))
    capture.take()
    x, target = batch()
    for others in (batch(n_records=N - 1), (x, target[:, :1]), (x, target.double())):
        with pytest.raises(ValueError, match="shapes and types of its first call"):
            run(*on_device(others, how))
    run(*on_device(batch(), how))  # the refusal took no batch
    assert capture.take().n_rows == N * DRAWS


def test_an_eager_pass_takes_any_shape():
    model = make_model()
    capture = captured(model)
    run = make_pass(capture, loss_of(model))
    for n_records in (N, N - 1):
        run(*batch(n_records=n_records))
        assert capture.take().n_rows == n_records * DRAWS


# ---- Gradients kept in half the memory


@pytest.mark.parametrize("how", ["eager", *RECORDED], indirect=["how"])
def test_with_bfloat16_gradients_the_bound_is_that_of_the_stored_values(how):
    """The factor is made from what is stored: no record adds more than C, in exact arithmetic."""
    model = make_model()
    capture = captured(model, dtype=torch.bfloat16)
    run = make_pass(capture, lambda x, target: 1e3 * loss_of(model)(x, target), how)
    optimizer = optimizer_of(capture)
    for n in range(N):
        x, target = batch()
        places = slice(n * DRAWS, (n + 1) * DRAWS)
        alone = torch.zeros_like(x), torch.zeros_like(target)
        alone[0][places], alone[1][places] = x[places], target[places]
        run(*on_device(alone, how))
        grads = capture.take()
        assert all(g.dtype == torch.bfloat16 for g in grads.per_record_grads)
        mask = torch.arange(N) == n
        clipped = optimizer.clipping.clip_and_sum(grads.grads.whole, mask)
        norm = float(clipped.values.square().sum().sqrt())
        assert C * (1 - 1e-6) < norm <= C


# ---- What is computed, read from the graph


def traced(targets, hidden: int = HIDDEN) -> torch.fx.Graph:
    model = make_model(targets, hidden)
    capture = captured(model)
    return make_fx(capture.as_function(loss_of(model)))(*batch()).graph


def products(graph: torch.fx.Graph) -> Counter:
    """Shapes of the results of all matrix products in the graph."""
    kinds = ("mm", "bmm", "addmm", "addmm_", "baddbmm", "baddbmm_", "convolution")
    return Counter(
        tuple(node.meta["val"].shape)
        for node in graph.nodes
        if node.op == "call_function" and any(f"aten.{kind}." in str(node.target) for kind in kinds)
    )


def test_no_gradient_of_a_frozen_weight_is_computed():
    """Nor one of a trained tensor that is summed over records: all are [N, ...]."""
    frozen = {(HIDDEN, WIDTH), (HIDDEN, HIDDEN), (WIDTH, HIDDEN)}
    summed = {(2, WIDTH), (2, HIDDEN), (HIDDEN, 2), (WIDTH, 2)}
    shapes = products(traced(LAYERS))
    assert shapes and not set(shapes) & (frozen | summed)
    per_record = {s for s in shapes if len(s) == 3 and s[0] == N}
    assert {tuple(sorted(s[1:])) for s in per_record} >= {(2, WIDTH), (2, HIDDEN)}


def test_the_same_reading_finds_a_weight_gradient_where_there_is_one():
    """Ordinary backward with trainable weights: the test above can fail."""
    model = make_model(LAYERS).requires_grad_(True)

    def run(x, target):
        return torch.autograd.grad(loss_of(model)(x, target), list(model.parameters()))

    shapes = products(make_fx(run)(*batch()).graph)
    assert {(HIDDEN, WIDTH), (HIDDEN, HIDDEN), (WIDTH, HIDDEN)} <= set(shapes)


def test_nothing_before_the_first_adapter_is_in_the_backward():
    """With an adapter in the last layer alone no derivative of tanh is left, and no input grad."""

    def count(graph, name: str) -> int:
        return sum(f"aten.{name}." in str(node.target) for node in graph.nodes)

    last, every = traced(("third",)), traced(LAYERS)
    assert count(last, "tanh") == count(every, "tanh") == 2
    assert count(every, "tanh_backward") == 2 and count(last, "tanh_backward") == 0
    rows = N * DRAWS * TOKENS
    # Products over all rows. Forward: each base, and A and B of each adapter. Backward: u for each
    # adapter, and g W0 and u A for each whose input has a gradient: all but the first.
    wide = {s: n for s, n in products(every).items() if s[0] == rows or s[0] == N * DRAWS}
    narrow = {s: n for s, n in products(last).items() if s[0] == rows or s[0] == N * DRAWS}
    assert sum(narrow.values()) == 3 + 3
    assert sum(wide.values()) == 3 + 3 * 3 + 2 * 2


def test_no_product_is_written_into_padded_memory():
    """The compiler refuses `out=` with gaps, as records of no whole 64 bytes would need it."""
    assert HIDDEN % 16 == 0
    for hidden in (HIDDEN, HIDDEN - 5):
        targets = [str(node.target) for node in traced(LAYERS, hidden).nodes]
        assert len(targets) > 20 and not any(target.endswith(".out") for target in targets)


# ---- CUDA graphs


def test_a_cuda_graph_without_a_gpu_is_refused():
    model = make_model()
    capture = captured(model)
    with pytest.raises(ValueError, match="needs a GPU, got inputs on cpu; choose 'inductor'"):
        make_pass(capture, loss_of(model), "cuda-graph")(*batch())
    make_pass(capture, loss_of(model))(*batch())
    assert capture.take().n_rows == N * DRAWS


def test_a_cuda_graph_is_recorded_once_after_warm_ups(fake_cuda):
    """Always over the same static input, whatever tensor was given; a replay calls no Python."""
    calls = []
    model = make_model()

    def loss(x, target):
        calls.append(x.data_ptr())
        return loss_of(model)(x, target)

    capture = captured(model)
    run = make_pass(capture, loss, "cuda-graph")
    for seed in range(3):
        run(*on_device(batch(seed), "cuda-graph"))
        capture.take()
    assert len(calls) == 3 + 1
    assert len(set(calls)) == 1


@pytest.mark.skipif(not torch.cuda.is_available(), reason="NOT RUN: CUDA graphs need a GPU")
def test_a_cuda_graph_on_the_device_gives_the_eager_gradients():
    model = make_model().cuda()
    capture = captured(model)
    rows = tuple(tensor.cuda() for tensor in batch())
    make_pass(capture, loss_of(model))(*rows)
    expected = [grad.clone() for grad in capture.take().per_record_grads]
    run = make_pass(capture, loss_of(model), "cuda-graph")
    for seed in (1, 0):
        run(*(tensor.cuda() for tensor in batch(seed)))
        got = capture.take().per_record_grads
    for ours, theirs in zip(got, expected, strict=True):
        assert distance([ours], [theirs]) <= 1e-5 * float(theirs.double().norm())


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # the compiler's own
def test_a_unet_compiles_to_its_eager_gradients(lora_unet):
    generator = torch.Generator().manual_seed(0)
    rows = (
        torch.randn(N * DRAWS, 1, 8, 8, generator=generator),
        torch.randint(1000, (N * DRAWS,), generator=generator),
        torch.randn(N * DRAWS, 2, 8, generator=generator),
    )

    def loss(sample, timestep, states):
        return lora_unet(sample, timestep, encoder_hidden_states=states).sample.square().mean()

    capture = captured(lora_unet)
    make_pass(capture, loss)(*rows)
    expected = capture.take().per_record_grads
    make_pass(capture, loss, "inductor")(*rows)
    got = capture.take().per_record_grads
    total = distance(expected, [torch.zeros_like(grad) for grad in expected])
    assert distance(got, expected) <= 1e-5 * total
