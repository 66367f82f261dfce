"""The moving average of the weights against its closed form."""

import pytest
import torch
from torch import nn

from dpengine.optim.update.average import WeightAverage

STEPS = 12


def history(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [
        [torch.randn(s, dtype=torch.float64, generator=generator) for s in ((3, 2), (4,))]
        for _ in range(STEPS)
    ]


def averaged(decay, weights, initial=7.0):
    params = [nn.Parameter(torch.full_like(tensor, initial)) for tensor in weights[0]]
    average = WeightAverage(params, decay)
    for step in weights:
        with torch.no_grad():
            for param, value in zip(params, step, strict=True):
                param.copy_(value)
        average.update()
    return average, params


@pytest.mark.parametrize("decay", [0.0, 0.5, 0.9, 0.9999])
@pytest.mark.parametrize("num_steps", [1, 2, STEPS])
def test_the_average_is_the_bias_corrected_geometric_mean_of_the_steps(decay, num_steps):
    weights = history()[:num_steps]
    average, _ = averaged(decay, weights)
    shares = [
        (1 - decay) * decay ** (num_steps - i) / (1 - decay**num_steps)
        for i in range(1, num_steps + 1)
    ]
    assert sum(shares) == pytest.approx(1)
    for index, tensor in enumerate(average.tensors):
        expected = sum(share * step[index] for share, step in zip(shares, weights, strict=True))
        torch.testing.assert_close(tensor, expected, rtol=1e-11, atol=1e-11)
    assert average.num_updates == num_steps


def test_the_initial_weights_have_no_part_in_it():
    near, far = (averaged(0.9, history(), initial)[0].tensors for initial in (0.0, 1e6))
    for a, b in zip(near, far, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


def test_decay_zero_is_the_last_step_alone():
    average, params = averaged(0.0, history())
    assert all(map(torch.equal, average.tensors, params))


def test_before_the_first_step_it_is_the_weights():
    params = [nn.Parameter(torch.ones(3))]
    average = WeightAverage(params, 0.9)
    with torch.no_grad():
        params[0].zero_()
    assert torch.equal(average.tensors[0], torch.ones(3))


def test_copy_to_params_puts_the_average_in_place_of_the_weights():
    average, params = averaged(0.9, history())
    kept = [tensor.clone() for tensor in average.tensors]
    average.copy_to_params()
    assert all(map(torch.equal, params, kept))
    assert all(map(torch.equal, average.tensors, kept))
    assert all(param.requires_grad for param in params)


@pytest.mark.parametrize("decay", [-0.1, 1.0, 1.5, float("nan")], ids=str)
def test_a_decay_outside_zero_and_one_is_refused(decay):
    with pytest.raises(ValueError, match=f"ema_decay.*{decay}"):
        WeightAverage([], decay)
