"""Who is right, what is timed and what fits, of steps whose answers are known."""

import math
from dataclasses import replace

import pytest
import torch
from torch import nn

from bench import peers, steps
from bench.peers import AS_RECORDS, DRAWS_PEERS, HOOKS, MAX_GRAD_NORM, NON_PRIVATE, OURS, PEERS
from bench.training import Task

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")

RECORDS, DRAWS = 4, 2


def rows(n_rows: int) -> tuple[torch.Tensor]:
    """Of norms from half of C to about three times C."""
    x = torch.randn(n_rows, 6, generator=torch.Generator().manual_seed(0))
    norms = MAX_GRAD_NORM * torch.linspace(0.5, 3, n_rows).unsqueeze(1)
    return (norms * x / x.norm(dim=1, keepdim=True),)


TASK = Task(
    lambda: nn.Linear(6, 1, bias=False),
    lambda model, x: model(x).mean(),
    lambda model, x: model(x).flatten(),
    rows,
)
"""A loss whose gradient is the row."""


def test_the_truth_is_the_sum_of_clipped_means_of_draws():
    means = rows(RECORDS * DRAWS)[0].double().view(RECORDS, DRAWS, 6).mean(1)
    norms = means.norm(dim=1)
    bound = norms.median() / 2 + norms.sort().values[RECORDS // 2] / 2
    assert norms.min() < bound < norms.max()
    expected = ((bound / norms).clamp(max=1).unsqueeze(1) * means).sum(0)
    found = steps.truth(TASK, RECORDS, DRAWS)
    assert found.max_grad_norm == pytest.approx(float(bound))
    torch.testing.assert_close(found.clipped_sum, expected)
    torch.testing.assert_close(found.plain_sum, means.sum(0))
    torch.testing.assert_close(found.norms, norms)
    assert found.error(OURS, 1.5 * expected) == pytest.approx(0.5)
    assert found.error(NON_PRIVATE, 1.5 * means.sum(0)) == pytest.approx(0.5)
    assert found.rounding < 2**-22


def test_who_refuses_and_who_is_wrong_is_told_and_left_out():
    def refuses(setup):
        raise NotImplementedError("no such layer\nand more")

    def clips_later(setup):
        return PEERS[OURS](replace(setup, draws=1, n_records=RECORDS))

    peers_here = {name: PEERS[name] for name in (NON_PRIVATE, OURS, HOOKS)}
    others = {"refuses": refuses, "wrong": clips_later}
    sound, verdicts = steps.examine(TASK, peers_here | others, RECORDS, DRAWS)
    assert set(sound) == {NON_PRIVATE, OURS}
    assert verdicts["refuses"] == {"not_run": "NotImplementedError: no such layer"}
    # Opacus' hooks know of no draws: they clip each.
    for name in (HOOKS, "wrong"):
        assert verdicts[name]["wrong"] and verdicts[name]["error"] > 0.01
    for name in (NON_PRIVATE, OURS):
        assert verdicts[name]["error"] <= verdicts[name]["tolerance"] < 1e-5


@pytest.mark.parametrize("scale", [0.25, 4.0])
@pytest.mark.parametrize("name", [NON_PRIVATE, OURS, HOOKS])
def test_gradients_of_another_scale_are_wrong(name, scale):
    """Clipped records alone would not show it."""

    def scaled(setup):
        loss = setup.loss
        return PEERS[name](replace(setup, loss=lambda *inputs: scale * loss(*inputs)))

    if name == HOOKS:
        _, verdicts = steps.examine(TASK, {OURS: PEERS[OURS], name: scaled}, RECORDS)
        assert verdicts[name]["wrong"]
    else:
        with pytest.raises(AssertionError, match="wrong"):
            steps.examine(TASK, {name: scaled}, RECORDS)


def test_a_phase_that_is_left_out_is_wrong_though_the_whole_step_is_right():
    def without_clipping(setup):
        run, whole = PEERS[HOOKS](setup), PEERS[NON_PRIVATE](setup)
        return replace(run, phases=whole.phases)

    peers = {OURS: PEERS[OURS], HOOKS: PEERS[HOOKS], "plain": without_clipping}
    assert set(steps.examine(TASK, peers, RECORDS)[0]) == set(peers)
    assert set(steps.examine(TASK, peers, RECORDS, in_phases=True)[0]) == {OURS, HOOKS}


def test_nothing_is_compared_with_a_wrong_step_of_ours():
    with pytest.raises(AssertionError):
        steps.examine(TASK, {OURS: PEERS[NON_PRIVATE]}, RECORDS)


def test_a_record_moves_its_sum_by_the_bound_or_by_each_of_its_draws():
    """The last row is of three times C; its copies are aligned."""
    ours = steps.contributions(TASK, DRAWS_PEERS[OURS], RECORDS, DRAWS)
    theirs = steps.contributions(TASK, DRAWS_PEERS[AS_RECORDS], RECORDS, DRAWS)
    assert ours["aligned"] == pytest.approx(1, rel=1e-4)
    assert theirs["aligned"] == pytest.approx(DRAWS, rel=1e-3)
    two = rows(RECORDS * DRAWS)[0][-DRAWS:].double()
    clipped = MAX_GRAD_NORM * two / two.norm(dim=1, keepdim=True)
    assert theirs["random"] == pytest.approx(float(clipped.sum(0).norm() / MAX_GRAD_NORM), rel=1e-3)


def test_phases_are_timed_apart(monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(steps.time, "perf_counter", lambda: clock[0])

    def takes(seconds):
        def phase(*_):
            clock[0] += seconds

        return phase

    training = peers.Training(takes(7.0), [], {"forward": takes(1.0), "clip": takes(2.5)})
    phased = steps.Phased(training, ())
    phased()
    phased()
    assert phased.seconds == {"forward": [1.0, 1.0], "clip": [2.5, 2.5]}


@pytest.mark.parametrize(
    "need",
    [
        lambda n: 10.0 + 3 * n,
        lambda n: 10.0 + 3 * n + (40 if n < 8 else 0),  # other operators for few records
        lambda n: max(90.0, 5.0 * n),  # what comes before the step weighs more
        lambda n: 1.0 + n**1.5,
        lambda n: 2.0 * n if n <= 37 else math.inf,  # a device that ran out
        lambda n: 60.0 + 50 * n,
    ],
)
@pytest.mark.parametrize("limit", [120.0, 1000.0, 5000.0])
def test_the_last_that_fits_is_that_of_trying_all(need, limit):
    best = max(n for n in range(1, 6000) if need(n) <= limit)
    tried = []

    def counted(n):
        tried.append(n)
        return need(n)

    assert steps.last_that_fits(counted, limit) == (best, need(best), need(best + 1))
    assert len(tried) == len(set(tried)) < 40


def test_a_limit_below_one_record_is_refused():
    with pytest.raises(ValueError, match="must hold one record, 100"):
        steps.last_that_fits(lambda n: 100 * n, 99)


def test_memory_above_non_private_is_told_in_gradients_of_all_records():
    """On images of 4 x 4 pixels the activations are small and hide nothing."""
    case = steps.Case(batch=16, rank=64, size=4)
    found = steps.peaks(case, {name: PEERS[name] for name in (NON_PRIVATE, OURS)})
    # to_q, to_k, to_v and to_out.0 of three layers of 32 channels and four of 64.
    assert found["parameters"] == 4 * 64 * 2 * (3 * 32 + 4 * 64)
    assert found["above_non_private"][NON_PRIVATE] == 0
    assert 0.5 < found["above_non_private"][OURS] <= 1.1
