"""Filters against dense solves and impulse responses, in float64."""

import copy
import math

import pytest
import torch

from dpengine.optim.update import Filter, Identity, LaplacianSmoothing, LowPass

STRENGTHS = (0.0, 0.1, 1.0, 30.0)
SIZES = (1, 2, 3, 8, 101)


def values(n, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, generator=generator, dtype=torch.float64)


def operator(strength, n):
    """I - s L as a matrix: entry by entry, each value and its two neighbours on a ring."""
    matrix = torch.eye(n, dtype=torch.float64)
    for i in range(n):
        matrix[i, i] += 2 * strength
        matrix[i, (i + 1) % n] -= strength
        matrix[i, (i - 1) % n] -= strength
    return matrix


@pytest.mark.parametrize("strength", STRENGTHS)
@pytest.mark.parametrize("n", SIZES)
def test_laplacian_smoothing_solves_the_dense_system(strength, n):
    gradient = values(n)
    expected = torch.linalg.solve(operator(strength, n), gradient)
    # A backward-stable solve errs by the condition number, at most 1 + 4 s = 121.
    smoothed = LaplacianSmoothing(strength)(gradient)
    assert smoothed.dtype == torch.float64
    torch.testing.assert_close(smoothed, expected, rtol=0, atol=121 * n * 2**-52)


@pytest.mark.parametrize("strength", STRENGTHS)
def test_laplacian_smoothing_keeps_the_mean_and_a_constant(strength):
    gradient = values(1001)
    smoothed = LaplacianSmoothing(strength)(gradient)
    torch.testing.assert_close(smoothed.mean(), gradient.mean(), rtol=0, atol=1e-14)
    constant = torch.full((1001,), 0.7, dtype=torch.float64)
    torch.testing.assert_close(LaplacianSmoothing(strength)(constant), constant, rtol=1e-14, atol=0)


@pytest.mark.parametrize("strength", STRENGTHS)
@pytest.mark.parametrize("n", SIZES)
def test_the_gain_of_smoothing_is_that_of_the_dense_inverse(strength, n):
    """White noise of variance 1 comes out with variance Σ_j (A⁻¹)_ij² in each value i."""
    inverse = torch.linalg.inv(operator(strength, n))
    expected = inverse.square().sum(1)
    gain = LaplacianSmoothing(strength).variance_gain(n)
    torch.testing.assert_close(expected, torch.full_like(expected, gain), rtol=1e-10, atol=0)


def test_smoothed_noise_has_the_variance_that_the_gain_states():
    """Neighbours correlate, so the mean square over P values has variance 2 Σ_k λ_k⁻⁴ / P²."""
    n, strength = 200_000, 1.0
    gain = LaplacianSmoothing(strength).variance_gain(n)
    assert gain == pytest.approx((1 + 2 * strength) / (1 + 4 * strength) ** 1.5, rel=1e-12)
    eigenvalues = [1 + 4 * strength * math.sin(math.pi * k / n) ** 2 for k in range(n)]
    tolerance = 6 * math.sqrt(2 * sum(value**-4 for value in eigenvalues)) / n
    measured = LaplacianSmoothing(strength)(values(n)).square().mean().item()
    assert measured == pytest.approx(gain, abs=tolerance)
    assert tolerance < 0.05 * gain


@pytest.mark.parametrize("decay", [0.0, 0.5, 0.9, 0.999])
def test_the_impulse_response_of_the_low_pass(decay):
    """An impulse in step j weighs (1 - d) dᵗ⁻ʲ / (1 - dᵗ) in step t, one element for each j."""
    low_pass, steps = LowPass(decay), 12
    for t in range(1, steps + 1):
        impulse = torch.zeros(steps, dtype=torch.float64)
        impulse[t - 1] = 1
        response = low_pass(impulse).tolist()
        weights = [(1 - decay) * decay ** (t - j) / (1 - decay**t) for j in range(1, t + 1)]
        assert response == pytest.approx(weights + [0.0] * (steps - t), rel=1e-11, abs=1e-300)
        assert sum(response) == pytest.approx(1, rel=1e-14)
        gain = low_pass.variance_gain(steps)
        assert gain == pytest.approx(sum(w * w for w in weights), rel=1e-11)


@pytest.mark.parametrize("decay", [0.0, 0.3, 0.99])
def test_a_constant_gradient_passes_the_low_pass_exactly(decay):
    low_pass, constant = LowPass(decay), values(20)
    for _ in range(50):
        assert torch.equal(low_pass(constant), constant)


def test_before_the_first_step_the_gain_is_that_of_the_first():
    assert LowPass(0.9).variance_gain(3) == 1


def test_the_identity_passes_everything():
    gradient = values(5)
    assert torch.equal(Identity()(gradient), gradient)
    assert Identity().variance_gain(5) == 1


def kinds():
    return [Identity(), LaplacianSmoothing(0.5), LowPass(0.9)]


def by_kind(kind):
    return type(kind).__name__


@pytest.mark.parametrize("kind", kinds(), ids=by_kind)
def test_a_state_or_a_deepcopy_goes_the_same_way(kind: Filter):
    fresh = copy.deepcopy(kind)
    fresh.load_state_dict(kind.state_dict())  # before the first step
    for t in range(4):
        kind(values(7, seed=t))
    state = kind.state_dict()
    assert all(isinstance(v, torch.Tensor | int | float) for v in state.values())
    fresh.load_state_dict(state)
    copied = copy.deepcopy(kind)
    for t in range(4, 8):
        expected = kind(values(7, seed=t))
        assert torch.equal(fresh(values(7, seed=t)), expected)
        assert torch.equal(copied(values(7, seed=t)), expected)


@pytest.mark.parametrize("kind", kinds(), ids=by_kind)
def test_a_filter_leaves_its_argument_and_its_state_alone(kind: Filter):
    """What an optimizer does to a gradient, as zeroing it, reaches neither."""
    twin = copy.deepcopy(kind)
    for t in range(3):
        argument = values(6, seed=t)
        output = kind(argument)
        assert torch.equal(argument, values(6, seed=t))
        assert torch.equal(output, twin(values(6, seed=t)))
        output.zero_()
        saved = kind.state_dict()
        for value in saved.values():
            if isinstance(value, torch.Tensor):
                value.zero_()


def test_a_loaded_state_is_a_copy():
    low_pass, other = LowPass(0.5), LowPass(0.5)
    low_pass(values(4))
    state = low_pass.state_dict()
    other.load_state_dict(state)
    state["output"].zero_()
    assert torch.equal(other(values(4, 1)), low_pass(values(4, 1)))


@pytest.mark.parametrize("strength", [-0.1, math.nan, math.inf])
def test_a_strength_out_of_range_is_refused(strength):
    with pytest.raises(ValueError, match=f"strength must be.*{strength}"):
        LaplacianSmoothing(strength)


@pytest.mark.parametrize("decay", [-0.1, 1.0, math.nan])
def test_a_decay_out_of_range_is_refused(decay):
    with pytest.raises(ValueError, match=f"decay must be.*{decay}"):
        LowPass(decay)


@pytest.mark.parametrize("kind", kinds(), ids=by_kind)
def test_a_number_of_values_below_one_is_refused(kind):
    with pytest.raises(ValueError, match=r"num_values must be.*0"):
        kind.variance_gain(0)


def test_another_number_of_values_is_refused_and_leaves_the_state():
    low_pass, twin = LowPass(0.5), LowPass(0.5)
    for low in (low_pass, twin):
        low(values(4))
    with pytest.raises(ValueError, match=r"noisy_mean must have shape \(4,\).*\(5,\).*new filter"):
        low_pass(values(5))
    assert torch.equal(low_pass(values(4, 1)), twin(values(4, 1)))


@pytest.mark.parametrize("kind", [Identity(), LaplacianSmoothing(1.0)], ids=by_kind)
def test_a_filter_without_state_refuses_one(kind):
    with pytest.raises(ValueError, match=r"state_dict must be empty.*num_steps"):
        kind.load_state_dict({"num_steps": 3})


@pytest.mark.parametrize("state", [{}, {"num_steps": 2}, {"num_steps": 0, "output": values(2)}])
def test_the_low_pass_refuses_another_state(state):
    with pytest.raises(ValueError, match="state_dict must hold `num_steps`"):
        LowPass(0.5).load_state_dict(state)
