"""Is one command faster than a script of Opacus, PEFT and diffusers, and are its images as good?

Whole processes take turns. Short jobs by default, whose images say little; with `--full` the
default job with three seeds, the script also with Opacus' own clipping of rows, and runs of one
step between those of all: their difference is the steps, what is left is start-up and results.
"""

from collections import defaultdict
from functools import partial
from statistics import mean, median

from . import product
from .product import COMMANDS, OURS, Job
from .turns import Turns, ratio


def test_product(benchmark, answer, full):
    sums_agree(answer)
    sides = list(COMMANDS) if full else [OURS, "opacus average"]
    lengths = (1, 32) if full else (2,)
    num_synthetic = 2000 if full else 50
    outcomes = defaultdict(list)

    def once(side: str, num_steps: int) -> None:
        found = outcomes[side, num_steps]
        found.append(product.run(side, Job(num_steps, num_synthetic, seed=len(found))))

    peers = {(side, n): partial(once, side, n) for n in lengths for side in sides}
    benchmark.pedantic(Turns(peers).round, rounds=3 if full else 2)

    seconds = {key: [outcome.seconds for outcome in found] for key, found in outcomes.items()}
    few, many = lengths[0], lengths[-1]
    job = {"num_steps": many, "num_synthetic": num_synthetic}
    whole = {side: seconds[side, many] for side in sides}
    peak = {side: [o.peak_bytes / 2**20 for o in outcomes[side, many]] for side in sides}
    for peer in sides[1:]:
        compared(answer, "whole", peer, whole, "s", job)
        compared(answer, "memory", peer, peak, "MiB", job)
    if few < many:
        of_lengths(answer, seconds, sides, few, many)
    for side in sides:
        found = outcomes[side, many]
        entry = job | {
            "side": side,
            "accuracy": [o.accuracy for o in found],
            "epsilon": found[0].epsilon,
            "noise_multiplier": found[0].noise_multiplier,
        }
        line = f"{mean(entry['accuracy']):.3f} accuracy, epsilon {entry['epsilon']:.4f}"
        answer("quality", entry, f"{side}: {line}, noise {entry['noise_multiplier']:.4f}")


def of_lengths(answer, seconds: dict, sides: list[str], few: int, many: int) -> None:
    """What two lengths of run tell: the seconds of a step, and those of all that is no step."""
    steps, rest = {}, {}
    for side in sides:
        runs = seconds[side, few], seconds[side, many], few, many
        steps[side], rest[side] = product.per_step(*runs), product.besides_steps(*runs)
    for peer in sides[1:]:
        compared(answer, "step", peer, steps, "s", {"from_num_steps": [few, many]})
        compared(answer, "besides", peer, rest, "s", {"from_num_steps": [few, many]})


def sums_agree(answer) -> None:
    """The script's clipped sum without noise is ours; one of rows has less of the gradient."""
    batch = product.fixed_batch(32, n_physical=2)
    agreement = product.agreement(batch)
    assert agreement.distance <= agreement.tolerance
    signal = product.signal_of_rows(batch)
    entry = {
        "records": batch.n_records,
        "distance": agreement.distance,
        "tolerance": agreement.tolerance,
        "rows_over_average": signal,
    }
    line = f"{agreement.distance:.1e} apart, at most {agreement.tolerance:.1e}; clipping rows"
    answer("sum", entry, f"{line} leaves {signal:.2f} of its length at the same noise")


def compared(answer, section: str, peer: str, values: dict, unit: str, about: dict) -> None:
    """Keep how much more ``peer`` takes than we do, with the medians of both beside it."""
    found = ratio(values[peer], values[OURS])
    medians = {side: median(values[side]) for side in (OURS, peer)}
    spread = f"{found['median']:.2f} ({found['quartile_1']:.2f} to {found['quartile_3']:.2f})"
    line = f"{peer} over {OURS} {spread}, {medians[peer]:.1f} over {medians[OURS]:.1f} {unit}"
    entry = about | {"peer": peer, "ratio": found, f"median_{unit.lower()}": medians}
    answer(section, entry, line)
