"""Peers of a training step on a model whose gradients are its inputs."""

from functools import partial

import pytest
import torch
from torch import nn

from bench import peers, training
from bench.peers import AS_RECORDS, AVERAGED, LOOP, MAX_GRAD_NORM, NON_PRIVATE, OURS
from bench.sums import clipped_sum
from bench.training import Task

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")

RECORDS, WIDTH = 5, 400
PRIVATE = [name for name in peers.PEERS if name not in (NON_PRIVATE, *peers.RECORDED)]


def rows(n_rows: int) -> tuple[torch.Tensor]:
    """Of norms from a twentieth of C to twenty times C."""
    x = torch.randn(n_rows, WIDTH, generator=torch.Generator().manual_seed(0))
    norms = MAX_GRAD_NORM * torch.logspace(-1.3, 1.3, n_rows).unsqueeze(1)
    return (norms * x / x.norm(dim=1, keepdim=True),)


def row_losses(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """w·x, of which the gradient in w is x."""
    return model(x).flatten()


TASK = Task(
    lambda: nn.Linear(WIDTH, 1, bias=False),
    lambda model, x: row_losses(model, x).mean(),
    row_losses,
    rows,
)


def clipped(x: torch.Tensor) -> torch.Tensor:
    """Σ_n min(1, C / ‖x_n‖) x_n."""
    return (x * (MAX_GRAD_NORM / x.norm(dim=1, keepdim=True)).clamp(max=1)).sum(0)


def close(found: torch.Tensor, expected: torch.Tensor) -> bool:
    """Float32, and Opacus' 1e-6 beside the smallest norm that is clipped."""
    return bool((found - expected).norm() <= (1e-6 + 1e-6 / MAX_GRAD_NORM) * expected.norm())


@pytest.mark.parametrize("in_phases", [False, True], ids=["step", "phases"])
@pytest.mark.parametrize("name", PRIVATE)
def test_every_private_peer_clips_each_record(name, in_phases):
    x = rows(RECORDS)[0].double()
    found = clipped_sum(TASK, peers.PEERS[name], RECORDS, in_phases=in_phases)
    assert close(found, clipped(x))


@pytest.mark.parametrize("name", [OURS, AVERAGED, LOOP])
def test_draws_are_averaged_before_they_are_clipped(name):
    means = rows(RECORDS * 3)[0].double().view(RECORDS, 3, WIDTH).mean(1)
    norms = means.norm(dim=1)
    assert 3 * norms.min() < MAX_GRAD_NORM < norms.max()
    found = clipped_sum(TASK, peers.DRAWS_PEERS[name], RECORDS, 3)
    assert close(found, clipped(means))


def test_draws_as_records_are_clipped_each():
    x = rows(RECORDS * 3)[0].double()
    found = clipped_sum(TASK, peers.DRAWS_PEERS[AS_RECORDS], RECORDS, 3)
    assert close(found, clipped(x))


@pytest.mark.parametrize("in_phases", [False, True], ids=["step", "phases"])
@pytest.mark.parametrize("name", PRIVATE)
def test_every_private_peer_adds_noise_to_the_sum(name, in_phases):
    """The standard deviation of 400 values is off by a fifth once in 10,000,000 times."""
    found = []

    def make_optimizer(params):
        optimizer = torch.optim.SGD(params, lr=1.0)
        optimizer.register_step_pre_hook(lambda *_: found.append(params[0].grad.flatten().clone()))
        return optimizer

    run = training.begin(TASK, peers.PEERS[name], make_optimizer, RECORDS, noise_multiplier=30.0)
    for phase in run.phases.values() if in_phases else [run.step]:
        phase(*rows(RECORDS))
    noise = RECORDS * found[0] - clipped(rows(RECORDS)[0])
    assert float(noise.std() / (30 * MAX_GRAD_NORM)) == pytest.approx(1, rel=0.2)


def test_the_phases_are_the_step_twice_over():
    """Nothing of a batch is left for the next one, in any of the two ways."""
    for start in peers.PEERS[OURS], peers.PEERS[peers.HOOKS], peers.PEERS[peers.GHOST]:
        weights = []
        for in_phases in (False, True):
            sgd = partial(torch.optim.SGD, lr=1.0)
            torch.manual_seed(0)
            run = training.begin(TASK, start, sgd, RECORDS, noise_multiplier=0.0)
            for _ in range(2):
                for phase in run.phases.values() if in_phases else [run.step]:
                    phase(*rows(RECORDS))
            weights.append(run.params[0].detach())
        assert torch.equal(*weights)


def test_the_loss_is_the_mean_of_the_losses_of_rows():
    task = training.small(size=8)
    model, inputs = task.make_model(), task.inputs(3)
    loss, losses = task.loss(model, *inputs), task.row_losses(model, *inputs)
    assert losses.shape == (3,) and float(loss) == pytest.approx(float(losses.mean()), rel=1e-6)
    alone = task.row_losses(model, *(tensor[1:2] for tensor in inputs))
    torch.testing.assert_close(losses[1:2], alone)
