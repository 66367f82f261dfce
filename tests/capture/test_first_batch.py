"""Modules that mix records, each refused at the first batch, and those that do not."""

import contextlib
import copy
from dataclasses import dataclass
from functools import partial

import pytest
import torch
from torch import nn

from dpengine import Capture, PrivacyError
from dpengine.capture.first_batch import look_now_and_then
from dpengine.mechanism.secure_random import SecureRandom

N, WIDTH = 6, 4


class Model(nn.Module):
    """Two trained layers around ``mix``, and another module ``after`` them."""

    def __init__(self, mix, after=None) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.mix, self.after = mix, after

    def forward(self, x):
        out = self.last(self.mix(self.first(x)))
        return out if self.after is None else self.after(out)


@dataclass
class Output:
    sample: torch.Tensor


def rows(n: int = N) -> torch.Tensor:
    return torch.randn(n, WIDTH, generator=torch.Generator().manual_seed(0))


def looked_at(model, *inputs, draws=1):
    """The first forward pass of ``model``; its capture, which is open then."""
    capture = Capture(model.train(), draws_per_record=draws)
    look_now_and_then(capture)
    model(*inputs)
    return capture


def from_tokens_first(mix, x):
    """[N, T, D] as [T, N, D]; with T = N the first axis looks right."""
    return mix(x.transpose(0, 1)).transpose(0, 1)


class Gated(nn.Module):
    """Mixes behind a factor that training opens."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Parameter(torch.zeros(()))

    def forward(self, x):
        return x + self.gate * x.mean(0)


MIXING = {
    "mean": lambda x: x - x.mean(0),
    "maximum": lambda x: x / x.abs().amax(),
    "neighbour": lambda x: x + 0.01 * x.roll(1, 0),
    "last row": lambda x: x + 0.01 * x[-1],
    "softmax": lambda x: x.softmax(0),
    "gated": Gated(),
}


@pytest.mark.parametrize("bad", [None, float("nan"), float("inf"), 1e12, 3e38])
@pytest.mark.parametrize("mix", MIXING.values(), ids=MIXING)
def test_a_part_that_mixes_is_refused_whatever_a_record_holds(mix, bad):
    """What it does is seen from the others, though one record alone decides on the maximum."""
    x = rows()
    if bad is not None:
        x[2] = bad
    with pytest.raises(PrivacyError, match="not kept apart"):
        looked_at(Model(copy.deepcopy(mix)), x)


AFTER = {"loss": lambda x: x.square().mean(), "dataclass": Output, "nothing": lambda x: None}


@pytest.mark.parametrize("after", AFTER.values(), ids=AFTER)
def test_an_output_without_rows_hides_nothing_that_trained_layers_are_given(after):
    with pytest.raises(PrivacyError, match="layer 'last' is given changes"):
        looked_at(Model(MIXING["mean"], after), rows())
    looked_at(Model(torch.tanh, after), rows())


def test_tokens_along_the_first_axis_are_seen_where_there_are_as_many_as_records():
    class Sequences(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(WIDTH, WIDTH)

        def forward(self, x):
            return from_tokens_first(self.inner, x)

    x = torch.randn(N, N, WIDTH, generator=torch.Generator().manual_seed(1))
    with pytest.raises(PrivacyError, match="what layer 'inner' is given changes"):
        looked_at(Sequences(), x)


def test_the_part_that_mixes_is_named():
    class Mean(nn.Module):
        def forward(self, x):
            return x - x.mean(0)

    with pytest.raises(PrivacyError, match="module 'mix', a Mean, mixes"):
        looked_at(Model(Mean()), rows())


def test_a_random_output_is_refused():
    with pytest.raises(PrivacyError, match="other outputs for the same inputs"):
        looked_at(Model(lambda x: x + torch.rand(())), rows())


def test_what_was_refused_stays_refused_and_what_passed_is_not_looked_at_again():
    model = Model(MIXING["mean"])
    look_now_and_then(Capture(model.train()))
    for _ in range(3):
        with pytest.raises(PrivacyError, match="not kept apart"):
            model(rows())
    calls = []
    model = Model(lambda x: calls.append(len(x)) or x)
    capture = looked_at(model, rows())
    n_calls = len(calls)
    capture.reset()
    model(rows())
    assert len(calls) == n_calls + 1


@pytest.mark.parametrize("draws", [1, 2])
@pytest.mark.parametrize("n_records", [1, 2, 3])
def test_draws_of_one_record_may_be_mixed_and_those_of_two_may_not(draws, n_records):
    def mix(x):
        return x - 0.5 * x.view(-1, draws, WIDTH).mean(1).repeat_interleave(draws, 0)

    looked_at(Model(mix), rows(n_records * draws), draws=draws)
    over_all = partial(looked_at, Model(MIXING["mean"]), rows(n_records * draws), draws=draws)
    if n_records == 1:
        over_all()
    else:
        with pytest.raises(PrivacyError, match="not kept apart"):
            over_all()


# ---- What shows with other sizes, in another order, backward, and in the module afterwards


class Queries(nn.Module):
    """Learned queries that all records share, through a trained layer: their axis is no batch."""

    def __init__(self, n_queries: int, through_a_fallback: bool) -> None:
        super().__init__()
        self.queries = nn.Parameter(torch.randn(n_queries, WIDTH), requires_grad=False)
        self.q = nn.Bilinear(WIDTH, WIDTH, WIDTH) if through_a_fallback else nn.Linear(WIDTH, WIDTH)
        self.last = nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        fallback = isinstance(self.q, nn.Bilinear)
        q = self.q(self.queries, self.queries) if fallback else self.q(self.queries)
        return self.last(torch.softmax(x @ q.T, -1) @ q)


@pytest.mark.parametrize("through_a_fallback", [False, True], ids=["rule", "fallback"])
def test_what_all_records_share_is_no_row_though_it_is_as_long_as_the_batch(through_a_fallback):
    """Taken for rows, query n would be record n's: a record moves the sum by 4 C."""
    with pytest.raises(PrivacyError, match=r"layer 'q'.*number of rows.*expand what all records"):
        looked_at(Queries(N, through_a_fallback), rows())


def scaled_by_size(x):
    return x * len(x)


def by_slot(x):
    return x * torch.arange(1, len(x) + 1)[:, None]


def over_capacity(x):
    """A router that keeps five rows at most, as in mixtures of experts."""
    return x * (torch.arange(len(x)) < 5)[:, None]


@pytest.mark.parametrize(
    ("mix", "cause"),
    [(scaled_by_size, "number of rows"), (by_slot, "place"), (over_capacity, "place")],
    ids=["size", "slot", "capacity"],
)
def test_output_that_depends_on_size_or_place_is_refused(mix, cause):
    with pytest.raises(PrivacyError, match=f"changes for a record with .*{cause}"):
        looked_at(Model(mix), rows())


class Backward(torch.autograd.Function):
    """Mixes records in its backward pass alone."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad + grad.mean(0)


def tensor_hook(x):
    x.register_hook(lambda grad: grad / grad.norm()) if x.requires_grad else None
    return x


def mean_of_squares(x):
    return x.square().mean()


def tokens(x):
    """All values of the batch in one row, as where a loss is kept for each token."""
    return x.square().flatten()


def both(x):
    return {"loss": x.square().sum(), "sample": x.detach()}


def over_the_loudest(x):
    """A mean over a number that depends on the records, as of tokens that are not padding."""
    return x.square().sum() / (x.abs() > 1).sum().clamp(1)


INSIDE = {"rows": None, "mean": mean_of_squares, "tokens": tokens, "dictionary": both}


@pytest.mark.parametrize("after", INSIDE.values(), ids=INSIDE)
@pytest.mark.parametrize("mix", [Backward.apply, tensor_hook], ids=["function", "hook"])
def test_records_that_are_mixed_backward_are_refused(mix, after):
    """Also where the module gives no rows, and computes the loss itself."""

    def nonlinear(x):
        return mix(x).sin()

    with pytest.raises(PrivacyError, match="the gradient of a record changes"):
        looked_at(Model(nonlinear, after), rows())
    looked_at(Model(torch.sin, after), rows())


def test_a_loss_inside_the_module_that_weighs_records_by_others_is_refused():
    with pytest.raises(PrivacyError, match="a mean is taken over what is not padding"):
        looked_at(Model(torch.sin, over_the_loudest), 3 * rows())


class ActNorm(nn.Module):
    """Initialises itself from the first batch, and never writes again."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind, self.is_done = kind, False
        self.shift = nn.Parameter(torch.zeros(WIDTH), requires_grad=kind == "trained")
        self.register_buffer("seen", torch.zeros(WIDTH))

    def forward(self, x):
        if not self.is_done:
            mean = x.detach().mean(0)
            if self.kind == "registered":
                self.register_buffer("mean", mean)
            elif self.kind == "buffer":
                self.seen.data.copy_(mean)
            else:
                self.shift.data.copy_(mean)
            self.is_done = True
        return x + self.shift - self.shift.detach()


@pytest.mark.parametrize("kind", ["frozen", "buffer", "registered"])
def test_a_module_that_keeps_something_of_its_first_batch_is_refused(kind):
    """By ways that move no version: the exact mean of private rows would be in every checkpoint."""
    with pytest.raises(PrivacyError, match=r"wrote into 'mix\."):
        looked_at(Model(ActNorm(kind)), rows())


def test_a_trained_tensor_that_its_first_batch_initialised_is_put_back():
    model = Model(ActNorm("trained"))
    looked_at(model, rows())
    assert not model.mix.shift.any()


class Codebook(nn.Module):
    """A frozen parameter that averages what passes, as of a VQ model, from its second pass on."""

    def __init__(self) -> None:
        super().__init__()
        self.code = nn.Parameter(torch.zeros(WIDTH), requires_grad=False)
        self.is_on = False

    def forward(self, x):
        if self.is_on:
            self.code.mul_(0.9).add_(0.1 * x.detach().mean(0))
        return x


def test_a_frozen_tensor_that_is_written_later_is_refused_in_that_pass():
    model = Model(Codebook())
    capture = looked_at(model, rows())
    capture.reset()
    model.mix.is_on = True
    with pytest.raises(PrivacyError, match=r"'mix\.code'"):
        model(rows())


class Keeps(nn.Module):
    """Keeps something of what passes once it ``is_on``, in one way or another."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.way, self.is_on, self.state = way, False, torch.zeros(WIDTH)
        self.register_buffer("seen", torch.zeros(WIDTH))

    def forward(self, x):
        if self.is_on:
            mean = x.detach().mean(0)
            if self.way == "buffer":
                self.seen.copy_(mean)
            elif self.way == "data":
                self.seen.data.copy_(mean)
            elif self.way == "new data":
                self.seen.data = mean
            elif self.way == "extra state":
                self.state = mean
            elif self.way == "failure":
                self.seen.copy_(mean)
                raise RuntimeError("out of memory")
        return x


class KeepsExtraState(Keeps):
    def get_extra_state(self):
        return {"mean": self.state}

    def set_extra_state(self, state):
        self.state = state["mean"]


def kept_of_a_pass(way: str) -> tuple[Model, Capture]:
    """A model that has kept something in a private pass after the look."""
    model = Model((KeepsExtraState if way == "extra state" else Keeps)(way))
    capture = looked_at(model, rows())
    capture.reset()
    model.mix.is_on = True
    with contextlib.suppress(PrivacyError, RuntimeError):
        model(rows())
    model.mix.is_on = False
    capture.reset()
    return model, capture


WAYS = ["buffer", "new data", "extra state", "failure"]


@pytest.mark.parametrize("way", WAYS)
def test_what_a_pass_wrote_stays_refused(way):
    """In a second try, in a new capture, and on the way out; until other values are loaded."""
    model, capture = kept_of_a_pass(way)
    for again in (partial(model, rows()), model.state_dict):
        with pytest.raises(PrivacyError, match=r"wrote into 'mix\."):
            again()
    capture.detach()
    with pytest.raises(PrivacyError, match=r"wrote into 'mix\."):
        Capture(model)
    public = Model((KeepsExtraState if way == "extra state" else Keeps)(way)).state_dict()
    model.load_state_dict(public)
    looked_at(model, rows())
    assert model.state_dict().keys() == public.keys()


def test_a_write_that_moves_no_version_shows_at_the_next_look_and_on_the_way_out(monkeypatch):
    model, _ = kept_of_a_pass("data")
    with pytest.raises(PrivacyError, match=r"wrote into 'mix\.seen'"):
        model.state_dict()
    model, capture = kept_of_a_pass("data")
    model(rows())  # known, and not looked at
    capture.reset()
    monkeypatch.setattr(SecureRandom, "uniform", lambda *_: [0.0])
    with pytest.raises(PrivacyError, match=r"wrote into 'mix\.seen'"):
        model(rows())


@pytest.mark.parametrize("kind", ["frozen", "buffer", "registered"])
def test_what_a_refused_look_wrote_stays_refused(kind):
    """The look was refused for another cause than what the module kept."""
    model = Model(nn.Sequential(ActNorm(kind), MixesAll()))
    capture = Capture(model.train())
    look_now_and_then(capture)
    for again in (partial(model, rows()), partial(model, rows()), model.state_dict):
        with pytest.raises(PrivacyError, match=r"wrote into 'mix\.0\."):
            again()


def test_values_that_others_write_between_two_passes_are_theirs():
    """A base loaded anew, cast and moved, and trained tensors updated by an optimizer."""
    model = Model(Keeps("nothing"))
    capture = looked_at(model, rows())
    capture.reset()
    with torch.no_grad():
        model.mix.seen.add_(1)
        for param in capture.parameters:
            param.data.add_(1)
    model(rows())
    model.mix.to(torch.float64)
    assert model.state_dict()["mix.seen"].dtype == torch.float64


class Shared(nn.Module):
    """A table that all records share, or a row of its own for each, beside rows in a fallback."""

    def __init__(self) -> None:
        super().__init__()
        self.scores = Scores()
        self.table = nn.Parameter(torch.randn(N, WIDTH), requires_grad=False)
        self.is_expanded = False

    def forward(self, x):
        if self.is_expanded:
            return self.scores(x, x)
        return self.scores(x, self.table)


class Scores(nn.Module):
    """Which columns of a table a row is near to; the fallback's, as no rule knows it."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(WIDTH))

    def forward(self, x, table):
        scores = (x * self.scale).sin() @ (table * self.scale).sum(0)[:, None]
        return x * self.scale + scores


@pytest.mark.parametrize("first", [N - 1, N + 1, 1])
def test_a_shared_table_is_no_row_in_a_later_batch_that_is_as_long(first):
    """Taken for rows, line n of the table would be record n's alone."""
    model = Shared()
    capture = looked_at(model, rows(first))
    capture.reset()
    if first == 1:  # not looked at, and either reading is right
        model(rows(N - 1))
        capture.reset()
    model(rows(N)).sin().sum().backward()
    for n, grads in enumerate(capture.take().per_record_grads[0]):
        capture.disable_hooks()
        [alone] = torch.autograd.grad(model(rows(N)[n : n + 1]).sin().sum(), capture.parameters)
        capture.enable_hooks()
        torch.testing.assert_close(grads, alone)


def test_rows_in_the_place_of_a_shared_table_are_refused():
    model = Shared()
    capture = looked_at(model, rows(N - 1))
    capture.reset()
    model.is_expanded = True
    with pytest.raises(ValueError, match="expand what all records share"):
        model(rows(N - 1))


class Unused(nn.Module):
    """q, k and v fused after the adapter was added: their own layers are not called any more."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.fused = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        return self.fused(x)


def test_trained_layers_that_nothing_calls_are_refused_by_name():
    with pytest.raises(PrivacyError, match="noise alone would train them: q; freeze"):
        looked_at(Unused(), rows())


def mixes_all(x):
    return x - x.mean(0)


class MixesAll(nn.Module):
    def forward(self, x):
        return mixes_all(x)


class OneToken(nn.Module):
    """Attention to one token: whatever q and k are, its softmax is 1."""

    def __init__(self) -> None:
        super().__init__()
        self.to_q, self.to_k, self.to_v = (nn.Linear(WIDTH, WIDTH) for _ in range(3))

    def forward(self, x):
        q, k, v = (layer(x)[:, None] for layer in (self.to_q, self.to_k, self.to_v))
        return torch.nn.functional.scaled_dot_product_attention(q, k, v)[:, 0]


@pytest.mark.parametrize("bad", [None, 1e12])
def test_tensors_whose_gradient_is_always_zero_are_refused_by_name(bad):
    x = rows()
    if bad is not None:
        x[2] = bad
    with pytest.raises(PrivacyError, match=r"noise alone would train them: to_q\.weight, to_q\.bi"):
        looked_at(OneToken(), x)
    model = OneToken()
    model.to_q.requires_grad_(False)
    model.to_k.requires_grad_(False)
    looked_at(model, x)


def mixes_large_batches(x):
    return x - x.mean(0) * (len(x) > 40)


@pytest.mark.parametrize("n", [2, 33, 100])
def test_batches_of_every_size_are_looked_at(n):
    with pytest.raises(PrivacyError, match="not kept apart"):
        looked_at(Model(MIXING["mean"]), rows(n))


def test_a_batch_much_larger_than_those_looked_at_is_looked_at_again():
    model = Model(mixes_large_batches)
    capture = looked_at(model, rows(20))
    capture.reset()
    with pytest.raises(PrivacyError, match="not kept apart"):
        model(rows(60))


def test_batches_of_a_shape_that_is_known_are_looked_at_now_and_then(monkeypatch):
    """By a secret coin: a module cannot tell which."""
    model = Model(torch.clone)
    capture = looked_at(model, rows())
    model.mix = mixes_all
    for chance, is_seen in ((1.0, False), (0.0, True)):
        capture.reset()
        monkeypatch.setattr(SecureRandom, "uniform", lambda *_, c=chance: [c])
        if is_seen:
            with pytest.raises(PrivacyError, match="not kept apart"):
                model(rows())
        else:
            model(rows())


def test_every_capture_looks_for_itself():
    model = Model(MIXING["mean"])
    for _ in range(2):
        with pytest.raises(PrivacyError, match="not kept apart"):
            looked_at(model, rows())
        [param.requires_grad_() for param in model.parameters()]
        for name in ("first", "last"):
            setattr(model, name, nn.Linear(WIDTH, WIDTH))
