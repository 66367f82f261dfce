"""Any order of calls draws noise once for each logical batch, or raises."""

import copy
import random

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from dpengine import BatchMemoryManager, Capture, DPOptimizer, PrivacyEngine, PrivacyError
from dpengine.mechanism import noise

RECORDS = 5


class Reference:
    """What the guarantee allows: each call says whether it may go on; ``noised`` are the sums."""

    def __init__(self, has_sampler: bool) -> None:
        self.has_sampler, self.noised, self.has_grad = has_sampler, [], False
        self.waiting = None
        self.discard()

    def discard(self) -> None:
        self.stage = "idle"
        self.begin_pass()
        self.sum, self.signals, self.is_whole, self.logical = [], [], False, None

    def begin_pass(self) -> None:
        self.waiting, self.is_lost = None if self.has_sampler else self.waiting, False

    def load(self, batch) -> bool:
        self.is_lost |= self.has_sampler and (self.stage != "idle" or self.waiting is not None)
        self.waiting = self.waiting if self.is_lost else batch
        return not self.is_lost

    def forward(self, n_rows: int) -> bool:
        if self.stage == "idle" and self.waiting is not None and not self.is_lost:
            self.stage, self.batch, self.n_rows = "open", self.waiting, n_rows
            self.waiting = None if self.has_sampler else self.waiting
        return self.stage == "open" and n_rows == self.n_rows

    def backward(self, is_stale: bool) -> bool:
        is_allowed = self.stage == "open" and not is_stale
        self.stage = "closed" if is_allowed else self.stage
        return is_allowed

    def zero_grad(self) -> None:
        self.has_grad = False
        if self.stage == "closed":  # a pass that is given up has had its signal
            self.stage, self.signals = "idle", self.signals[1:]

    def clip(self) -> bool:
        if self.is_whole or self.has_grad or self.stage != "closed":
            return False
        self.stage, (records, logical, is_last) = "idle", self.batch
        do_skip = self.signals.pop(0) if self.signals else None
        if (is_contradicted := self.has_sampler and do_skip is is_last) or logical != self.logical:
            self.sum = []
        self.logical = logical
        if not is_contradicted:
            self.sum = self.sum + records
            self.is_whole = is_last if self.has_sampler else not do_skip
        return not is_contradicted

    def add_noise(self) -> bool:
        if is_whole := self.is_whole:
            self.noised, self.has_grad = [*self.noised, sorted(self.sum)], True
            self.sum, self.is_whole = [], False
        return is_whole

    def step(self) -> bool:
        return self.clip() and (not self.is_whole or self.add_noise())


class Loop:
    """A user's loop in any order; record n has the gradient e_n, so a sum shows who is in it."""

    def __init__(self, has_sampler: bool, physical: int, rng: random.Random) -> None:
        self.rng, self.has_sampler = rng, has_sampler
        self.reference = Reference(has_sampler)
        self.model = nn.Linear(RECORDS, 1, bias=False)
        inner = torch.optim.SGD(self.model.parameters(), lr=1.0)
        self.loader = DataLoader(TensorDataset(torch.eye(RECORDS)), batch_size=2)
        if has_sampler:
            self.engine = PrivacyEngine()
            _, self.optimizer, self.loader = self.engine.make_private(
                module=self.model,
                optimizer=inner,
                data_loader=self.loader,
                noise_multiplier=1.0,
                max_grad_norm=1.0,
                loss_reduction="sum",
            )
            manager = BatchMemoryManager(self.loader, physical, self.optimizer)
            self.loader = manager.__enter__()
            self.capture = self.optimizer._source
            self.announce, self.capture.announcements.announce = (
                self.capture.announcements.announce,
                self.announced,
            )
        else:
            self.capture = Capture(self.model)
            self.optimizer = DPOptimizer(
                inner,
                noise_multiplier=1.0,
                max_grad_norm=1.0,
                expected_batch_size=None,
                loss_reduction="sum",
            )
        self.iterator, self.rows, self.losses, self.is_stale = None, None, [], True
        self.logical = 0

    def check(self, is_allowed: bool, call, *arguments) -> None:
        if is_allowed:
            call(*arguments)
        else:
            with pytest.raises(PrivacyError):
                call(*arguments)

    def announced(self, notice, *how) -> None:
        self.notice = notice
        self.announce(notice, *how)

    def begin_pass(self) -> None:
        self.reference.begin_pass()
        self.iterator = iter(self.loader)

    def load(self) -> None:
        if self.iterator is None:
            self.begin_pass()
        is_refused = False
        try:
            (rows,) = next(self.iterator)
        except StopIteration:
            self.iterator = None
            return
        except PrivacyError:
            is_refused, self.iterator = True, None
        batch = [], None, True
        if not is_refused:
            records = rows.nonzero()[:, 1].tolist()
            notice = self.notice if self.has_sampler else None
            self.logical += self.has_sampler and notice.is_first
            batch = records, self.logical, notice and notice.is_last
            self.rows = rows
        assert self.reference.load(batch) != is_refused

    def forward(self) -> None:
        if self.rows is None:
            return
        is_fresh = self.reference.stage == "idle"
        is_allowed = self.reference.forward(len(self.rows))
        if is_allowed and is_fresh:
            self.losses, self.is_stale = [], False
        self.check(is_allowed, lambda: self.losses.append(self.model(self.rows).sum()))

    def backward(self) -> None:
        if self.losses:
            loss = self.losses[0]
            is_allowed = self.reference.backward(self.is_stale)
            self.is_stale = True
            self.check(is_allowed, lambda: loss.backward(retain_graph=True))

    def step(self) -> None:
        self.check(self.reference.step(), self.optimizer.step)

    def pre_step(self) -> None:
        self.check(self.reference.step(), self.optimizer.pre_step)

    def clip_and_accumulate(self) -> None:
        self.check(self.reference.clip(), self.optimizer.clip_and_accumulate)

    def add_noise(self) -> None:
        self.check(self.reference.add_noise(), self.optimizer.add_noise)

    def zero_grad(self) -> None:
        self.reference.zero_grad()
        self.optimizer.zero_grad(set_to_none=self.rng.random() < 0.5)

    def discard(self) -> None:
        self.reference.discard()
        self.optimizer.discard()
        self.is_stale = True

    def signal_skip_step(self) -> None:
        do_skip = self.rng.random() < 0.5
        self.reference.signals.append(do_skip)
        self.optimizer.signal_skip_step(do_skip)

    def step_of_a_copy(self) -> None:
        with pytest.raises(ValueError, match="captured"):
            copy.deepcopy(self.optimizer).step()

    def evaluate(self) -> None:
        self.model.eval()(torch.eye(RECORDS))
        self.model.train()

    def state_of_the_optimizer(self) -> None:
        self.optimizer.load_state_dict(self.optimizer.state_dict())


LAWFUL = ("load", "forward", "backward", "step", "zero_grad")
OTHERS = (
    *LAWFUL,
    "begin_pass",
    "pre_step",
    "clip_and_accumulate",
    "add_noise",
    "discard",
    "signal_skip_step",
    "step_of_a_copy",
    "evaluate",
    "state_of_the_optimizer",
)


def run(n_sequences: int, monkeypatch) -> int:
    """Sums noised in random sequences, each checked against the reference call by call."""
    noised: list[list[int]] = []

    def without_noise(clipped_sum, noise_multiplier, divisor, random):
        assert (noise_multiplier, divisor, clipped_sum.sensitivity) == (1.0, 1.0, 1.0)
        counts = clipped_sum.values.round().int()
        noised.append(torch.arange(RECORDS).repeat_interleave(counts).tolist())
        return clipped_sum.values

    monkeypatch.setattr(noise, "noisy_mean", without_noise)
    total = 0
    for number in range(n_sequences):
        rng = random.Random(number)
        loop = Loop(number % 3 > 0, 1 + number % 2, rng)
        noised.clear()
        disorder, given_up, turn = rng.choice([0.02, 0.1, 0.5]), rng.choice([0, 0.4]), 0
        for _ in range(rng.randint(5, 50)):
            if rng.random() < disorder:
                getattr(loop, rng.choice(OTHERS))()
            else:
                name = LAWFUL[turn % len(LAWFUL)]
                is_given_up = name == "step" and rng.random() < given_up
                getattr(loop, "zero_grad" if is_given_up else name)()
                turn += 1
        assert noised == loop.reference.noised
        if loop.has_sampler:
            assert all(len(set(records)) == len(records) for records in noised)
            assert len(noised) <= len(loop.engine.accountant)
        total += len(noised)
    return total


def test_random_sequences_draw_noise_once_for_a_logical_batch_or_raise(monkeypatch):
    assert run(300, monkeypatch) > 300  # else the sequences show little


@pytest.mark.slow
def test_ten_thousand_random_sequences(monkeypatch):
    assert run(10_000, monkeypatch) > 10_000
