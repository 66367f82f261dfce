"""Which failures of Opacus' tests are differences that docs/from-opacus.md names."""

import re

DIFFERENCES: tuple[tuple[str, str], ...] = (
    ("`batch_first=False`", r"batch_first must be True"),
    ("an empty batch has a row of zeros", r"at least one record; row n \* K \+ k"),
    ("dropout above 0 is refused", r"has dropout (_prob )?[\d.]+, drawn from a generator"),
    ("BatchNorm is refused", r"is a BatchNorm\w+, which mixes the records"),
    ("`p.grad_sample` is `optimizer.grad_samples`", r"no attribute 'grad_sample'"),
    ("`p.summed_grad` is inside", r"no attribute 'summed_grad'"),
    ("`max_grad_norm` is one number", r"max_grad_norm must be one number"),
    ("`get_epsilon` takes no `alphas`", r"unexpected keyword argument 'alphas'"),
)
"""What the page says, and what the failure says; values that differ are never in the list."""


def difference(failures: list[str]) -> str | None:
    """The documented difference that all ``failures`` come from, the first; None for a gap."""
    found = [
        next((name for name, words in DIFFERENCES if re.search(words, text)), None)
        for text in failures
    ]
    return None if None in found or not found else found[0]
