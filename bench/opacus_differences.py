"""Which failures of Opacus' tests are differences that docs/from-opacus.md names."""

import re

DIFFERENCES: tuple[tuple[str, str, str], ...] = (
    ("`batch_first=False` is refused", "", r"batch_first must be True"),
    ("`batch_first=False` is refused", "Text", r"'attn', a DPMultiheadAttention, mixes the recor"),
    ("an empty batch comes as a row of zeros", "", r"at least one record; row n \* K \+ k"),
    ("dropout above 0 is refused", "", r"has dropout (_prob )?[\d.]+, drawn from a generator"),
    ("BatchNorm is refused", "", r"is a BatchNorm\w+, which mixes the records"),
    (
        "embedding bags take a row of ids for each bag",
        "",
        r"is given the ids of all bags one after",
    ),
    ("`p.grad_sample` is `optimizer.grad_samples`", "", r"no attribute 'grad_sample'"),
    ("`p.summed_grad` is part of `add_noise`", "", r"no attribute 'summed_grad'"),
    ("`max_grad_norm` is one number", "", r"max_grad_norm must be one number"),
    (
        "a generator, whose seed would give the draws away, is refused",
        "",
        r"generator must be None",
    ),
    ("`torch.manual_seed` repeats no private run", "", r"after deterministic run must match"),
    (
        "`torch.manual_seed` repeats no private run",
        "test_(global_seed|original_generator|dl_seed|equivalent_to_one_batch)",
        r"is not (true|false)|must match the size of tensor",
    ),
    (
        "`torch.manual_seed` repeats no private run",
        "CustomLayer.*test_noise_level$",
        r"!= .* within .* delta",
    ),
    ("a module that needs no change is not copied", "compatible_module_inaction", r"is not false"),
    (
        "an error says otherwise what is wrong",
        "validator_weight_update",
        r"hold the module's param",
    ),
    ("a batch that is not trained on is refused", "", r"the sampler's last batch was not used"),
    ("two backward passes before `step()` are refused", "", r"a forward pass began before step"),
    (
        "noise and clip schedulers go with an optimizer of one's own",
        "",
        r"noise_multiplier is what",
    ),
    (
        "adaptive clipping is `clipping=Adaptive(...)`",
        "",
        r"does not take target_unclipped_quantile",
    ),
    ("adaptive clipping is `clipping=Adaptive(...)`", "AdaClip", r"must all be captured by one"),
    ("a forgotten `zero_grad()` is a `PrivacyError`", "zero_grad", r"holds an ordinary gradient"),
    ("pieces of a batch need no `zero_grad()`", "splitter_zero_grad", r"ValueError not raised"),
    ("functorch's own attributes are not there", "EngineValidation", r"False is not true"),
)
"""What the page says, part of the test's name, and what its failure says.

Gradients that differ are in none of them.
"""


def difference(node: str, failures: list[str]) -> str | None:
    """The documented difference that all ``failures`` come from, the first; None for a gap."""
    found = [
        next(
            (
                name
                for name, of, words in DIFFERENCES
                if re.search(of, node) and re.search(words, text)
            ),
            None,
        )
        for text in failures
    ]
    return None if None in found or not found else found[0]
