"""What all tables of README.md and docs/benchmarks.md are made with."""

from collections.abc import Iterable, Mapping
from typing import Any

Content = Mapping[str, Any]
"""What a file of results holds."""

Ratio = Mapping[str, float]
"""As ``turns.ratio`` gives it."""


def markdown(header: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """A table; its first column names the row."""
    header = list(header)
    lines = [header, ["---"] + ["---:"] * (len(header) - 1), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def spread(ratio: Ratio) -> str:
    """Median of the ratios in a round, in brackets the quartiles; of fewer than five the range."""
    low, high = ("quartile_1", "quartile_3") if ratio["rounds"] >= 5 else ("least", "most")
    return f"{ratio['median']:.2f} ({ratio[low]:.2f}–{ratio[high]:.2f})"


def entries(content: Content, section: str) -> list[dict[str, Any]]:
    """What a suite kept under ``section``; nothing where it did not run."""
    return content["results"].get(section, [])
