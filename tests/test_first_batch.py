"""Modules that mix records, each refused at the first batch, and those that do not."""

import copy
from dataclasses import dataclass
from functools import partial

import pytest
import torch
from torch import nn

from dpengine import Capture, PrivacyError
from dpengine.first_batch import look_once

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
    look_once(capture)
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
    look_once(Capture(model.train()))
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
        return x - x.view(-1, draws, WIDTH).mean(1).repeat_interleave(draws, 0)

    looked_at(Model(mix), rows(n_records * draws), draws=draws)
    over_all = partial(looked_at, Model(MIXING["mean"]), rows(n_records * draws), draws=draws)
    if n_records == 1:
        over_all()
    else:
        with pytest.raises(PrivacyError, match="not kept apart"):
            over_all()
