"""Times to compare on a busy machine: peers take turns, ratios are taken within a round."""

import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from statistics import median, quantiles
from typing import Generic, TypeVar

import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
"""What is measured on."""

Name = TypeVar("Name", bound=Hashable)


class Turns(Generic[Name]):
    """Callables that take turns. Each round runs every one once and begins with another one.

    Whatever else the machine does slows neighbours in a round alike, so the ratio within a round
    says more than either time.
    """

    def __init__(self, peers: Mapping[Name, Callable[[], object]]) -> None:
        self._peers = dict(peers)
        self._rounds = 0
        self.seconds: dict[Name, list[float]] = {name: [] for name in peers}
        """Of each peer, in each round."""

    def round(self) -> None:
        """Run every peer once."""
        names = list(self._peers)
        first = self._rounds % len(names)
        for name in names[first:] + names[:first]:
            begin = time.perf_counter()
            self._peers[name]()
            wait()
            self.seconds[name].append(time.perf_counter() - begin)
        self._rounds += 1

    def warm_up(self, rounds: int = 1) -> None:
        """Rounds that are not counted: state is made, caches fill."""
        for _ in range(rounds):
            for peer in self._peers.values():
                peer()
        wait()

    def ratio(self, above: Name, below: Name) -> dict[str, float]:
        """How much longer ``above`` takes than ``below``."""
        return ratio(self.seconds[above], self.seconds[below])

    def median_ms(self) -> dict[Name, float]:
        """Milliseconds of each peer: for orientation, as machines and moments differ."""
        return {name: 1e3 * median(taken) for name, taken in self.seconds.items()}


def wait() -> None:
    """For a device that works on after a call."""
    if DEVICE == "cuda":
        torch.cuda.synchronize()


def ratio(above: Sequence[float], below: Sequence[float]) -> dict[str, float]:
    """Median, quartiles and number of the ratios in a round, and the ratio of the fastest rounds.

    The quartiles are those of these rounds, within their range. Other work can only add time, so
    the fastest rounds are the least disturbed.
    """
    ratios = [a / b for a, b in zip(above, below, strict=True)]
    several = len(ratios) > 1
    low, middle, high = quantiles(ratios, n=4, method="inclusive") if several else ratios * 3
    return {
        "median": middle,
        "quartile_1": low,
        "quartile_3": high,
        "least": min(ratios),
        "most": max(ratios),
        "of_fastest": min(above) / min(below),
        "rounds": len(ratios),
    }
