"""What Opacus' tests import in place of theirs, in a process of their own: a plugin of pytest.

Its oracle is made to give our per-record gradients, each comparison is written to a log, and so is
what becomes of each test.
"""

import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import opacus.utils.per_sample_gradients_utils as theirs
import torch
from hypothesis import HealthCheck, Phase, settings
from hypothesis.errors import UnsatisfiedAssumption
from torch import Tensor, nn

from dpengine import Capture
from dpengine.dropin.loader import refuse

from .opacus_differences import difference

LOG = Path(os.environ["OPACUS_SUITE_LOG"])

# An example that fails is not made smaller: that takes hours and tells nothing of the kind.
settings.register_profile(
    "suite",
    max_examples=20,
    phases=[Phase.explicit, Phase.generate],
    database=None,
    deadline=None,
    suppress_health_check=list(HealthCheck),
)
settings.load_profile("suite")


def _write(**line: Any) -> None:
    with LOG.open("a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")


@contextmanager
def taken() -> Iterator[None]:
    """Logs what is refused; Hypothesis goes on with what is taken, and fails where nothing is."""
    try:
        yield
    except Exception as error:
        reason = difference("", [str(error)])
        _write(example="refused", reason=reason)
        if reason is None:
            raise
        raise UnsatisfiedAssumption(str(error)) from error


@taken()
def grad_samples(
    x: Any,
    module: nn.Module,
    batch_first: bool = True,
    loss_reduction: str = "mean",
    grad_sample_mode: str = "hooks",
) -> dict[str, Tensor]:
    """Our gradient of each record, times their number where the loss is a mean, as in Opacus."""
    refuse(None, False, batch_first, False)
    module = theirs.ModelWithLoss(theirs.clone_module(module), loss_reduction)
    inner = module.wrapped_module.train()
    capture = Capture(inner)
    torch.manual_seed(0)
    module(x).backward()
    scale = capture.n_rows if loss_reduction == "mean" else 1
    names = [name for name, param in inner.named_parameters() if param.requires_grad]
    grads = dict(zip(names, capture.per_record_grads, strict=True))
    return {name: scale * tensor for name, tensor in grads.items()}


def compared(
    x: Any,
    module: nn.Module,
    batch_first: bool = True,
    loss_reduction: str = "mean",
    grad_sample_mode: str = "hooks",
    **how: Any,
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The gradients of one record at a time, and ours."""
    call = {"batch_first": batch_first, "loss_reduction": loss_reduction}
    ours = grad_samples(x, module, **call)
    packed = isinstance(x, torch.nn.utils.rnn.PackedSequence)
    alone = theirs.unpack_packedsequences(x) if packed else x
    reference = theirs.compute_microbatch_grad_sample(alone, module, **call, **how)
    same = reference.keys() == ours.keys() and all(
        ours[name].shape == one.shape and torch.allclose(ours[name], one, rtol=1e-4, atol=1e-5)
        for name, one in reference.items()
    )
    _write(example="equal" if same else "different")
    return reference, ours


def pytest_runtest_logreport(report: Any) -> None:
    """Log each test and sub-test: its outcome, and the lines that say why it failed."""
    if report.when == "call" or report.outcome != "passed":
        text = report.longreprtext if report.outcome == "failed" else ""
        errors = [line for line in text.splitlines() if re.match(r"E |.*Error: ", line)]
        _write(test=report.nodeid, outcome=report.outcome, text="\n".join(errors) or text[-500:])


theirs.compute_opacus_grad_sample = grad_samples
theirs.compute_grad_samples_microbatch_and_opacus = compared
