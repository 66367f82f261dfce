"""What is going on: a line for each phase, and bars of public numbers only."""

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar

from tqdm import tqdm

from .. import accounting
from ..accounting import AccountingError
from .ledger import Ledger

_EPS_ERROR = 0.02
_EPSILON_UPDATES = 20

T = TypeVar("T")


def phase(text: str) -> None:
    """Say what begins now and may take a while."""
    print(f"{text} ...", flush=True)


def percent(items: Sequence[T], text: str) -> Iterable[T]:
    """``items``, with a bar that shows no count, which may be private. On terminals alone."""
    return tqdm(items, text, leave=False, disable=None, bar_format="{l_bar}{bar}|")


class Progress:
    """Steps done, draws per second and epsilon spent: numbers of the plan, and noised ones."""

    def __init__(self, ledger: Ledger, bar: tqdm) -> None:
        self._ledger = ledger
        self._bar = bar
        self._every = max(1, ledger.plan.num_steps // _EPSILON_UPDATES)
        self._epsilon = self._epsilon_until_next()

    def advance(self, noisy_share: float | None = None) -> None:
        """Show one more step, and the noised share of records within the clip bound, if any."""
        self._bar.update()
        done = self._bar.n - self._bar.initial
        if done % self._every == 0 or self._ledger.remaining == 0:
            self._epsilon = self._epsilon_until_next()
        plan = self._ledger.plan
        draws = done * plan.expected_batch_size * plan.rows_per_unit * plan.draws_per_record
        rate = draws / max(self._bar.format_dict["elapsed"], 1e-9)
        shown = f"{rate:,.0f} draws/s, {self._epsilon}"
        if noisy_share is not None:
            shown += f", about {noisy_share:.0%} within the bound"
        self._bar.set_postfix_str(shown)

    def _epsilon_until_next(self) -> str:
        # A bound that holds until it is shown again: accounting for each step would cost seconds.
        ledger, plan = self._ledger, self._ledger.plan
        if plan.noise_multiplier == 0:
            return "not private"
        num_steps = min(ledger.reserved + self._every, plan.num_steps)
        try:
            bounds = accounting.plan_epsilon(
                plan,
                num_steps,
                # The whole plan's bound is the claim, so a coarse one may not exceed it.
                eps_error=_EPS_ERROR if num_steps < plan.num_steps else accounting.EPS_ERROR,
            )
        except AccountingError:
            return "epsilon within the plan"
        return f"epsilon <= {math.ceil(100 * bounds.upper) / 100:.2f}"


@contextmanager
def progress_bar(ledger: Ledger) -> Iterator[Progress]:
    """A bar over the plan's steps, those charged before included.

    draws/s is the expected batch size times the images and the noise draws of each unit over time,
    whatever the batches really held.
    """
    with tqdm(
        total=ledger.plan.num_steps, initial=ledger.reserved, unit="step", dynamic_ncols=True
    ) as bar:
        yield Progress(ledger, bar)
