"""How a step grows, and what two processes would gain: pytest bench/test_growth.py --benchmark-only

Curves of a non-private step and of ours over five quantities, each with a straight line and what it
misses; then the records a second of one logical batch on two processes, beside those on one. Before
it is timed, our step without noise is compared with a loop over records at the largest value.
"""

import pytest
import torch

from . import growth, two_processes
from .growth import NON_PRIVATE, OURS, QUANTITIES
from .turns import ratio

IMAGE = 16


@pytest.mark.parametrize("name", QUANTITIES)
def test_growth(answer, full, name):
    quantity = QUANTITIES[name]
    values = quantity.all_values if full else quantity.values
    largest = quantity.at(values[-1])
    expected = growth.expected(largest)
    growth.check(largest, growth.update(largest, expected.max_grad_norm), expected)
    entry = growth.measure(name, values, rounds=15 if full else 5)
    answer("growth", entry, _line(entry))


def test_two_processes(answer, full):
    point = growth.Point(growth.small(size=IMAGE), records=4)
    expected = growth.expected(point)
    first, second = two_processes.updates(IMAGE, point.records, expected.max_grad_norm)
    assert first == second
    growth.check(point, torch.tensor(first, dtype=torch.float64), expected)

    sizes = [4, 8, 16, 32, 64] if full else [4, 8, 16]
    threads = torch.get_num_threads()
    taken = two_processes.seconds(IMAGE, sizes, 20 if full else 5, threads)
    for records, of in taken.items():
        alone, together = of[two_processes.ONE], of[two_processes.TWO]
        gain = ratio(alone, together)
        entry = {
            "device": "cpu",
            "records": records,
            "threads": {"1 process": threads, "each of 2": max(1, threads // 2)},
            "throughput_over_one_process": gain,
            "records_per_s_of_one": records / min(alone),
        }
        answer(
            "processes",
            entry,
            f"{records:3} records: 2 processes do {gain['median']:.2f} times the records a second "
            f"of 1 (quartiles {gain['quartile_1']:.2f} to {gain['quartile_3']:.2f}), "
            f"{threads} threads in all",
        )


def _line(entry: dict) -> str:
    values, steps = entry["values"], entry["steps"]
    last = {impl: steps[impl]["time"]["ratios"][-1]["median"] for impl in steps}
    misses = {impl: steps[impl]["time"]["line"]["misses"] for impl in steps}
    flops, peak = entry["privacy_adds"]["flops"], entry["privacy_adds"]["peak_bytes"]
    return (
        f"{entry['axis']} {values[0]} to {values[-1]}: time x {last[OURS]:.2f} "
        f"(line misses {misses[OURS]:.1%}), non-private x {last[NON_PRIVATE]:.2f} "
        f"({misses[NON_PRIVATE]:.1%}); privacy adds {flops['counts'][0] / 1e6:.1f} to "
        f"{flops['counts'][-1] / 1e6:.1f} MFLOP ({flops['line']['misses']:.1%}) and "
        f"{peak['counts'][0] / 1e6:.2f} to {peak['counts'][-1] / 1e6:.2f} MB "
        f"({peak['line']['misses']:.1%})"
    )
