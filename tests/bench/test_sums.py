"""Who takes the right sum, of steps whose answers are known."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from bench import sums
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
    found = sums.truth(TASK, RECORDS, DRAWS)
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
    sound, verdicts = sums.examine(TASK, peers_here | others, RECORDS, DRAWS)
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
        _, verdicts = sums.examine(TASK, {OURS: PEERS[OURS], name: scaled}, RECORDS)
        assert verdicts[name]["wrong"]
    else:
        with pytest.raises(AssertionError, match="wrong"):
            sums.examine(TASK, {name: scaled}, RECORDS)


def test_without_privacy_a_billionth_is_seen():
    """What is eager float32 itself is no yardstick for itself: it is judged in float64."""

    def scaled(setup):
        loss = setup.loss
        return PEERS[NON_PRIVATE](replace(setup, loss=lambda *inputs: (1 + 1e-9) * loss(*inputs)))

    with pytest.raises(AssertionError, match="wrong"):
        sums.examine(TASK, {NON_PRIVATE: scaled}, RECORDS)


def test_a_phase_that_is_left_out_is_wrong_though_the_whole_step_is_right():
    def without_clipping(setup):
        run, whole = PEERS[HOOKS](setup), PEERS[NON_PRIVATE](setup)
        return replace(run, phases=whole.phases)

    peers = {OURS: PEERS[OURS], HOOKS: PEERS[HOOKS], "plain": without_clipping}
    assert set(sums.examine(TASK, peers, RECORDS)[0]) == set(peers)
    assert set(sums.examine(TASK, peers, RECORDS, in_phases=True)[0]) == {OURS, HOOKS}


def test_nothing_is_compared_with_a_wrong_step_of_ours():
    with pytest.raises(AssertionError):
        sums.examine(TASK, {OURS: PEERS[NON_PRIVATE]}, RECORDS)


def test_a_record_moves_its_sum_by_the_bound_or_by_each_of_its_draws():
    """The last row is of three times C; its copies are aligned."""
    ours = sums.contributions(TASK, DRAWS_PEERS[OURS], RECORDS, DRAWS)
    theirs = sums.contributions(TASK, DRAWS_PEERS[AS_RECORDS], RECORDS, DRAWS)
    assert ours["aligned"] == pytest.approx(1, rel=1e-4)
    assert theirs["aligned"] == pytest.approx(DRAWS, rel=1e-3)
    two = rows(RECORDS * DRAWS)[0][-DRAWS:].double()
    clipped = MAX_GRAD_NORM * two / two.norm(dim=1, keepdim=True)
    assert theirs["random"] == pytest.approx(float(clipped.sum(0).norm() / MAX_GRAD_NORM), rel=1e-3)
