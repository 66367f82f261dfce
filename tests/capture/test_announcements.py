"""A batch is the one that the sampler announced: every loader, every way to lose a batch."""

import random
from collections import deque
from itertools import count

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, Dataset

from dpengine import Capture, DPOptimizer, PrivacyError
from dpengine.capture.announcements import Announcements
from dpengine.mechanism.batches import BatchNotice
from dpengine.mechanism.plan import PrivacyPlan
from dpengine.mechanism.private import Private
from dpengine.mechanism.sampling import PoissonSampler

RECORDS, SLOTS, STEPS = 7, 3, 2
BATCHES = 3  # physical ones of each step at rate 1
SERIALS = 100


def notice(n_records: int = SLOTS, *, first: bool = True, last: bool = True) -> BatchNotice:
    return BatchNotice(Private(n_records), SLOTS, is_first=first, is_last=last)


def make_sampler(capture, prefetch: int = 0, steps: int = STEPS):
    """At rate 1: each step takes all records, in physical batches of 3, 3 and 1."""
    plan = PrivacyPlan(
        sampling_rate=1.0,
        noise_multiplier=0.0,
        num_steps=steps,
        max_grad_norm=1.0,
        delta=1e-3,
        public_dataset_size=RECORDS,
        adjacency="zero-out",
        draws_per_record=1,
        trainable_parameters=SERIALS + 1,
    )
    return PoissonSampler(
        RECORDS,
        plan,
        num_steps=steps,
        physical_batch_size=SLOTS,
        reserve=lambda: None,
        announce=capture.announcements.announce,
        prefetch=prefetch,
    )


class Rows(Dataset):
    """Row n of a batch is the unit vector of its record, padding that after the last record."""

    def __getitem__(self, batch) -> torch.Tensor:
        places = torch.full((batch.n_slots,), RECORDS)
        places[: len(batch.indices)] = torch.from_numpy(batch.indices[:, 0])
        return torch.eye(SERIALS + 1)[places]

    __getitems__ = __getitem__  # for a loader that takes the sampler as its batch sampler

    def __len__(self) -> int:
        return RECORDS


def make_private(
    make: type[nn.Module] = nn.Sequential,
) -> tuple[nn.Module, Capture, DPOptimizer, list]:
    """A layer whose record's gradient is its row; and what has been noised, once per update.

    Without noise an update moves the weights by the sum of the rows that entered it.
    """
    model = make(nn.Linear(SERIALS + 1, 1, bias=False)).train()
    capture = Capture(model)
    optimizer = DPOptimizer(
        torch.optim.SGD(capture.parameters, lr=1.0),
        noise_multiplier=0.0,
        max_grad_norm=1.0,
        expected_batch_size=1.0,
        loss_reduction="sum",
    )
    noised: list[torch.Tensor] = []
    optimizer.attach_step_hook(
        lambda noisy: noised.append(torch.cat([p.grad.flatten() for p in noisy.params]))
    )
    return model, capture, optimizer, noised


def entered(noised: torch.Tensor) -> list[int]:
    """How often each row entered a sum, by its place; a factor just below 1 is rounded away."""
    assert (noised - noised.round()).abs().max() < 1e-5
    return noised.round().long().tolist()


ALL_ONCE = [1] * RECORDS + [0] * (SERIALS + 1 - RECORDS)


def train(model, optimizer, batches, skip: tuple[int, ...] = ()) -> None:
    for number, rows in enumerate(batches):
        if number not in skip:
            model(rows).sum().backward()
            optimizer.step()
            optimizer.zero_grad()


# ---- Announcements alone


def test_without_a_sampler_the_optimizers_signals_tell_where_a_logical_batch_ends():
    assert Announcements().next(4) == BatchNotice(Private(4), 4, is_first=False, is_last=None)


def test_a_pass_before_the_first_announcement_is_refused_where_one_is_expected():
    notices = Announcements()
    notices.expect()
    with pytest.raises(PrivacyError, match="did not announce"):
        notices.next(4)


@pytest.mark.parametrize("prefetch", [0, 1, 4])
def test_notices_come_in_order_at_a_constant_distance(prefetch):
    notices, sent = Announcements(), [notice(n) for n in range(6)]
    requests = deque([*sent, *[None] * prefetch])
    for _ in range(prefetch):
        notices.announce(requests.popleft(), prefetch)
    for expected in sent:
        request = requests.popleft()
        notices.announce(request, prefetch)
        assert notices.next(SLOTS) == expected


@pytest.mark.parametrize("prefetch", [0, 1, 4])
def test_a_pass_that_no_batch_was_announced_for_is_refused(prefetch):
    notices = Announcements()
    notices.announce(None, prefetch)
    with pytest.raises(PrivacyError):
        notices.next(SLOTS)


def test_a_batch_of_another_size_is_refused():
    notices = Announcements()
    notices.announce(notice(), 0)
    with pytest.raises(PrivacyError, match="another size"):
        notices.next(SLOTS + 1)


@pytest.mark.parametrize("prefetch", [0, 1, 4])
def test_no_batch_is_handed_out_while_another_is_at_work(prefetch):
    """Its forward pass would join the set of the other, and a record could count twice."""
    at_work: list[bool] = []
    notices = Announcements(is_idle=lambda: not at_work)
    for _ in range(prefetch):
        notices.announce(notice(), prefetch)
    at_work.append(True)
    with pytest.raises(PrivacyError, match="last batch was not used"):
        notices.announce(notice(), prefetch)


@pytest.mark.parametrize("prefetch", [0, 2])
def test_after_a_refused_request_every_pass_is_refused(prefetch):
    """The loader has lost a batch, and the next one must not take its place."""
    at_work: list[bool] = []
    notices = Announcements(is_idle=lambda: not at_work)
    for _ in range(prefetch + 1):
        notices.announce(notice(), prefetch)
    notices.next(SLOTS)
    at_work.append(True)
    with pytest.raises(PrivacyError):
        notices.announce(notice(), prefetch)
    at_work.clear()
    for _ in range(prefetch + 2):
        # As the sampler does after a failure: it has nothing more to hand out.
        notices.announce(None, prefetch)
        with pytest.raises(PrivacyError):
            notices.next(SLOTS)
    notices.clear()
    for _ in range(prefetch + 1):
        notices.announce(notice(), prefetch)
    assert notices.next(SLOTS) == notice()


# ---- Loaders


def loader_of(kind: str, sampler, prefetch: int):
    if kind == "none":
        return map(Rows().__getitem__, sampler)
    if kind == "torch":
        return DataLoader(Rows(), sampler=sampler, batch_size=None)
    if kind == "torch batch_sampler":
        return DataLoader(Rows(), batch_sampler=sampler, collate_fn=lambda rows: rows)
    if kind == "workers":
        return DataLoader(
            Rows(), sampler=sampler, batch_size=None, num_workers=2, prefetch_factor=prefetch // 2
        )
    from accelerate import Accelerator

    workers = {"num_workers": 1, "prefetch_factor": prefetch - 1} if prefetch > 1 else {}
    loader = DataLoader(Rows(), batch_sampler=sampler, collate_fn=_identity, **workers)
    return Accelerator(cpu=True).prepare(loader)


def _identity(rows: torch.Tensor) -> torch.Tensor:
    return rows


KINDS = [
    ("none", 0),
    ("torch", 0),
    ("torch batch_sampler", 0),
    ("accelerate", 1),
    ("workers", 4),
]
loaders = pytest.mark.parametrize(("kind", "prefetch"), KINDS)


@loaders
def test_each_record_enters_each_step_once_under_every_loader(kind, prefetch):
    """Two passes over the data, padding left out."""
    model, capture, optimizer, noised = make_private()
    sampler = make_sampler(capture, prefetch)
    for _ in range(2):
        train(model, optimizer, loader_of(kind, sampler, prefetch))
    assert [entered(update) for update in noised] == [ALL_ONCE] * (2 * STEPS)


@loaders
@pytest.mark.parametrize("skip", [0, 1, BATCHES - 1, BATCHES, STEPS * BATCHES - 1])
def test_a_batch_that_the_loop_skips_ends_the_run(kind, prefetch, skip):
    """At the latest in the next pass over the data; no sum but whole ones is ever noised."""
    model, capture, optimizer, noised = make_private()
    sampler = make_sampler(capture, prefetch)
    with pytest.raises(PrivacyError, match=r"every batch must be used|was not used"):
        for _ in range(2):
            train(model, optimizer, loader_of(kind, sampler, prefetch), skip=(skip,))
    assert [entered(update) for update in noised] == [ALL_ONCE] * (skip // BATCHES)


@loaders
def test_a_batch_used_for_two_steps_is_refused(kind, prefetch):
    model, capture, optimizer, noised = make_private()
    rows = next(iter(loader_of(kind, make_sampler(capture, prefetch), prefetch)))
    train(model, optimizer, [rows])
    with pytest.raises(PrivacyError):
        train(model, optimizer, [rows])
    assert noised == []


@pytest.mark.parametrize(
    ("kind", "real", "said"),
    [
        ("torch", 0, 1),
        ("accelerate", 1, 0),
        ("accelerate", 1, 2),
        ("workers", 4, 0),
        ("workers", 4, 2),
        ("workers", 4, 5),
    ],
)
def test_a_wrong_prefetch_is_refused_at_the_first_batch(kind, real, said):
    model, capture, optimizer, noised = make_private()
    sampler = make_sampler(capture, said)
    with pytest.raises(PrivacyError, match="prefetch"):
        train(model, optimizer, loader_of(kind, sampler, real))
    assert noised == []


@pytest.mark.parametrize("n_samplers", [1, 2])
def test_two_passes_that_take_turns_do_not_share_a_sum(n_samplers):
    """Else a record of both would be in one sum twice."""
    model, capture, optimizer, noised = make_private()
    samplers = [make_sampler(capture) for _ in range(n_samplers)]
    passes = [iter(samplers[0]), iter(samplers[-1])]
    for turn in (0, 1, 0, 1, 0, 1, 1):
        rows = Rows()[next(passes[turn])]
        train(model, optimizer, [rows])
    assert noised and all(max(entered(sums)) <= 1 for sums in noised)


@loaders
def test_after_discard_in_the_middle_a_new_pass_begins(kind, prefetch):
    model, capture, optimizer, noised = make_private()
    sampler = make_sampler(capture, prefetch)
    batches = iter(loader_of(kind, sampler, prefetch))
    train(model, optimizer, [next(batches) for _ in range(1)])
    model(next(batches)).sum().backward()
    optimizer.discard()
    del batches
    assert noised == []
    train(model, optimizer, loader_of(kind, sampler, prefetch))
    assert [entered(update) for update in noised] == [ALL_ONCE] * STEPS


def test_a_new_pass_over_a_loader_that_works_ahead_needs_discard():
    """What the first pass has fetched and not used was announced."""
    model, capture, optimizer, noised = make_private()
    sampler = make_sampler(capture, 1)
    train(model, optimizer, [next(iter(loader_of("accelerate", sampler, 1)))])
    with pytest.raises(PrivacyError, match="not ahead of the model"):
        train(model, optimizer, loader_of("accelerate", sampler, 1))
    optimizer.discard()
    train(model, optimizer, loader_of("accelerate", sampler, 1))
    assert [entered(update) for update in noised] == [ALL_ONCE] * STEPS


@loaders
def test_a_batch_that_failed_does_not_leave_its_place_to_the_next(kind, prefetch):
    """Out of memory in the forward pass, caught by a loop that goes on with the next batch."""
    model, capture, optimizer, noised = make_private()
    batches = iter(loader_of(kind, make_sampler(capture, prefetch), prefetch))

    def out_of_memory(*_):
        raise torch.OutOfMemoryError

    hook = model[0].register_forward_hook(out_of_memory)
    rows = next(batches)
    with pytest.raises(torch.OutOfMemoryError):
        model(rows)
    hook.remove()
    for _ in range(STEPS * BATCHES):
        with pytest.raises((PrivacyError, StopIteration)):
            train(model, optimizer, [next(batches)])
    assert noised == []


def test_prepare_over_workers_is_refused_at_the_last_batch():
    """Past the end such a loader asks once less than it works ahead; that is not told from a skip.

    One worker that prefetches two, and one more.
    """
    model, capture, optimizer, noised = make_private()
    with pytest.raises(PrivacyError, match=r"not ahead of the model .* prefetch, 3 batches"):
        train(model, optimizer, loader_of("accelerate", make_sampler(capture, 3), 3))
    assert [entered(update) for update in noised] == [ALL_ONCE] * (STEPS - 1)


def test_a_loader_that_left_the_sampler_behind_trains_on_nothing():
    """``accelerator.prepare`` rebuilds a loader without its ``sampler``; ``batch_sampler`` stays.

    The rebuilt one asks for records by number, which a dataset of physical batches does not have.
    """
    from accelerate import Accelerator

    model, capture, optimizer, noised = make_private()
    loader = DataLoader(Rows(), sampler=make_sampler(capture, 1), batch_size=None)
    with pytest.raises(AttributeError, match="'int' object has no attribute 'n_slots'"):
        train(model, optimizer, Accelerator(cpu=True).prepare(loader))
    assert noised == []


# ---- Evaluation and recomputation between steps


@pytest.mark.parametrize("how", ["eval", "no_grad", "eval of another size"])
def test_evaluation_between_steps_takes_no_batch(how):
    model, capture, optimizer, noised = make_private()
    for rows in loader_of("accelerate", make_sampler(capture, 1), 1):
        train(model, optimizer, [rows])
        if how == "no_grad":
            with torch.no_grad():
                model(rows)
        else:
            model.eval()(rows if how == "eval" else rows[:1])
            model.train()
    assert [entered(update) for update in noised] == [ALL_ONCE] * STEPS


class Recomputed(nn.Module):
    """The layer twice, so that the second one's recomputation needs the first."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.layer = layer
        self.use_reentrant = False

    def forward(self, x):
        return checkpoint(self.layer, x, use_reentrant=self.use_reentrant)


def test_recomputation_in_the_backward_pass_takes_no_batch():
    model, capture, optimizer, noised = make_private(Recomputed)
    train(model, optimizer, loader_of("accelerate", make_sampler(capture, 1), 1))
    assert [entered(update) for update in noised] == [ALL_ONCE] * STEPS


def test_reentrant_recomputation_is_refused():
    """Its forward pass runs without gradients, and a second one inside of backward."""
    model, capture, optimizer, noised = make_private(Recomputed)
    model.use_reentrant = True
    rows = next(iter(loader_of("none", make_sampler(capture), 0)))
    with pytest.raises(PrivacyError, match="use non-reentrant activation checkpointing"):
        train(model, optimizer, [rows.requires_grad_()])
    assert noised == []


# ---- Random sequences of calls


class Reference:
    """What may happen: a batch handed over goes through forward, backward and step, once.

    ``sums``: the serial numbers of the batches in each noised sum.
    """

    def __init__(self, prefetch: int) -> None:
        self.prefetch = prefetch
        self.sums: list[list[int]] = []
        self.discard()

    def discard(self) -> None:
        self.waiting, self.at_work, self.stage, self.sum = deque(), None, "idle", []
        self.lost = False

    def announce(self, batch) -> bool:
        if self.stage != "idle" or (self.prefetch == 0 and self.waiting):
            self.lost = True
            return False
        if batch is not None and not any(self.waiting):
            self.waiting.clear()
        if batch is not None or self.prefetch:
            self.waiting.append(batch)
        return True

    def forward(self, batch) -> bool:
        in_step = len(self.waiting) == self.prefetch + 1 and not self.lost
        if self.stage == "idle" and in_step and self.waiting[0]:
            self.at_work, self.stage = self.waiting.popleft(), "open"
            assert self.at_work == batch  # the theorem: it is the batch whose place it takes
        return self.stage == "open"

    def backward(self, stale: bool) -> bool:
        allowed = self.stage == "open" and not stale
        self.stage = "closed" if allowed else self.stage
        return allowed

    def step(self) -> bool:
        if self.stage != "closed":
            return False
        self.stage = "idle"
        serial, batch = self.at_work
        self.sum = [*([] if batch.is_first else self.sum), serial]
        if batch.is_last:
            self.sums.append(self.sum)
            self.sum = []
        return True


class Loop:
    """Capture and optimizer under a loader that asks ahead as torch's does."""

    def __init__(self, prefetch: int) -> None:
        self.model, self.capture, self.optimizer, self.noised = make_private()
        self.prefetch, self.reference = prefetch, Reference(prefetch)
        self.serials = count()
        self.sizes: dict[int, int] = {}
        self.losses, self.stale = [], True
        self.restart()

    def announce(self, batch: BatchNotice | None, prefetch: int = 0) -> None:
        announced = None if batch is None else (next(self.serials), batch)
        if announced:
            self.sizes[announced[0]] = batch.n_records.reveal()
        allowed = self.reference.announce(announced)
        self.check(
            allowed, lambda: self.capture.announcements.announce(batch, prefetch=self.prefetch)
        )
        if not allowed:
            raise PrivacyError
        self.announced = announced

    def check(self, allowed: bool, call) -> None:
        if allowed:
            call()
        else:
            with pytest.raises(PrivacyError):
                call()

    def request(self):
        next(self.source)
        return self.announced

    def restart(self) -> None:
        self.batch = None  # a loop that begins anew leaves what an earlier pass handed out
        sampler = make_sampler(self.capture, self.prefetch, steps=2)
        sampler._announce = self.announce
        self.source, self.fetched = iter(sampler), deque()
        try:
            for _ in range(self.prefetch):
                self.fetched.append(self.request())
        except (StopIteration, PrivacyError):
            pass

    def next(self) -> None:
        if self.prefetch and not self.fetched:
            return
        handed = self.fetched.popleft() if self.prefetch else None
        try:
            self.fetched.append(self.request())
        except PrivacyError:
            return  # what was to be handed over is lost with the request
        except StopIteration:
            pass
        self.batch = handed if self.prefetch else self.fetched.pop() if self.fetched else None

    def rows(self) -> torch.Tensor:
        serial, batch = self.batch
        places = torch.full((SLOTS,), SERIALS)
        places[: batch.n_records.reveal()] = serial
        return torch.eye(SERIALS + 1)[places]

    def forward(self) -> None:
        if self.batch is None:
            return
        fresh = self.reference.stage == "idle"
        allowed = self.reference.forward(self.batch)
        if allowed and fresh:
            self.losses, self.stale = [], False
        self.check(allowed, lambda: self.losses.append(self.model(self.rows()).sum()))

    def backward(self) -> None:
        if self.losses:
            allowed = self.reference.backward(self.stale)
            self.stale = True
            self.check(allowed, lambda: sum(self.losses).backward(retain_graph=True))

    def step(self) -> None:
        self.check(self.reference.step(), self.optimizer.step)
        self.optimizer.zero_grad()

    def discard(self) -> None:
        self.reference.discard()
        self.optimizer.discard()
        self.stale = True

    def recover(self) -> None:
        self.discard()
        self.restart()

    def evaluate(self) -> None:
        self.model.eval()(torch.zeros(2, SERIALS + 1))
        self.model.train()

    def evaluate_in_training_mode(self) -> None:
        with torch.no_grad():
            self.check(
                self.reference.stage != "open",
                lambda: self.model(torch.zeros(SLOTS, SERIALS + 1)),
            )


LAWFUL = ["next", "forward", "backward", "step"]
OTHERS = [*LAWFUL, "discard", "restart", "recover", "evaluate", "evaluate_in_training_mode"]


@pytest.mark.parametrize("prefetch", [0, 1, 2])
@pytest.mark.parametrize("disorder", [0.05, 0.2])
def test_any_sequence_of_calls_noises_one_logical_batch_or_is_refused(prefetch, disorder):
    """Against the reference, call by call; sums hold whole batches of one logical batch, once."""
    rng = random.Random(f"{prefetch} {disorder}")
    seen = 0
    for _ in range(60):
        loop = Loop(prefetch)
        turn = 0
        for _ in range(40):
            if rng.random() < disorder:
                getattr(loop, rng.choice(OTHERS))()
            else:
                getattr(loop, LAWFUL[turn % 4])()
                turn += 1
        assert len(loop.noised) == len(loop.reference.sums)
        for noised, serials in zip(loop.noised, loop.reference.sums, strict=True):
            expected = [loop.sizes[n] if n in serials else 0 for n in range(SERIALS)]
            assert entered(noised) == [*expected, 0]
            assert len(set(serials)) == len(serials) <= BATCHES
            assert sum(expected) <= RECORDS
        seen += len(loop.noised)
    assert seen >= 20  # else the sequences show little


def test_an_orderly_loop_noises_every_logical_batch_whole():
    loop = Loop(prefetch=2)
    for _ in range(2 * BATCHES):
        for name in LAWFUL:
            getattr(loop, name)()
    assert loop.reference.sums == [[0, 1, 2], [3, 4, 5]]
    assert len(loop.noised) == 2
