"""Sources of noise: what is called normal is, and what is not is refused."""

import pytest

from bench import noise, turns

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")

COUNT = 40_000


@pytest.mark.parametrize("name", noise.sources())
def test_every_source_gives_standard_normals(name):
    values = noise.sources()[name](COUNT)
    assert values.shape == (COUNT,)
    noise.check(values)


@pytest.mark.parametrize(("scale", "shift"), [(1.05, 0.0), (0.95, 0.0), (1.0, 0.05)])
def test_other_values_are_refused(scale, shift):
    """Each is off by seven deviations or more."""
    values = noise.sources()[noise.RANDN_DOUBLE](COUNT)
    with pytest.raises(AssertionError, match="deviations off"):
        noise.check(scale * values + shift)


def test_bytes_a_second_are_of_four_bytes_a_value():
    timed = turns.Turns({noise.OURS: None, noise.RANDN: None})
    timed.seconds = {noise.OURS: [0.002, 0.004, 0.002], noise.RANDN: [0.001, 0.001, 0.001]}
    found = noise.compared(1_000, timed)
    assert found["gb_per_s"] == {noise.OURS: pytest.approx(2e-3), noise.RANDN: pytest.approx(4e-3)}
    assert found["over_randn"][noise.OURS]["median"] == pytest.approx(2)
