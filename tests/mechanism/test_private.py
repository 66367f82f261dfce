"""Private values do not come out by accident, and what opens them is listed."""

import ast
import copy
import json
import logging
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch

import dpengine
from dpengine import PrivacyError
from dpengine.mechanism.private import Private

SECRET = 271828

LEAKS = {
    "str": str,
    "format": "{}".format,
    "format with a width": "{:>9}".format,
    "percent": lambda p: "%s" % p,  # noqa: UP031
    "print": print,
    "bytes": bytes,
    "equal": lambda p: p == SECRET,
    "not equal": lambda p: p != SECRET,
    "less": lambda p: p < SECRET,
    "greater": lambda p: p > SECRET,
    "between privates": lambda p: p >= Private(1),
    "hash": hash,
    "a condition": bool,
    "int": int,
    "float": float,
    "round": round,
    "range": range,
    "len": len,
    "iteration": list,
    "membership": lambda p: 2 in p,
    "indexing": lambda p: p[0],
    "arithmetic": lambda p: p + 1,
    "numpy": np.asarray,
    "tensor": torch.tensor,
    "json": json.dumps,
    "pickle": pickle.dumps,
    "copy": copy.copy,
    "deepcopy": copy.deepcopy,
    "torch.save": lambda p: torch.save(p, "/dev/null"),
}


@pytest.mark.parametrize("leak", LEAKS.values(), ids=LEAKS)
@pytest.mark.parametrize("value", [SECRET, torch.tensor([SECRET]), str(SECRET)])
def test_a_private_value_cannot_be_looked_at(leak, value, capfd):
    with pytest.raises((PrivacyError, TypeError)) as error:
        leak(Private(value))
    printed = capfd.readouterr()
    assert str(SECRET) not in f"{error.value}{printed.out}{printed.err}"


def test_logging_and_reprs_say_nothing(capfd, caplog):
    logging.getLogger("dpengine").warning("loss %r", Private(SECRET))
    logging.getLogger("dpengine").warning("loss %s", [Private(SECRET)])
    assert caplog.messages == ["loss Private()", "loss [Private()]"]
    with pytest.raises(PrivacyError):
        logging.getLogger("dpengine").warning("loss %s", Private(SECRET))
    printed = capfd.readouterr()
    assert str(SECRET) not in printed.out + printed.err


DOORS = {
    "capture/capture.py": ["take"],  # which slots hold records, for clipping to select
    "data/draws.py": ["draw_rows"],  # the rows of a batch, private again
    "training/loop.py": ["steps", "train"],  # the forward pass; the coins
    # The public form; the size under zero-out.
    "training/planning.py": ["make_plan", "check_unchanged"],
}
"""Every function that opens a private value, by file."""


def _doors(source: str) -> list[str]:
    functions = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.FunctionDef)]
    return [
        function.name
        for function in functions
        if any(isinstance(n, ast.Attribute) and n.attr == "reveal" for n in ast.walk(function))
    ]


def test_private_values_are_opened_where_this_table_says():
    root = Path(dpengine.__file__).parent
    found = {
        str(file.relative_to(root)): doors
        for file in sorted(root.rglob("*.py"))
        if (doors := _doors(file.read_text(encoding="utf-8")))
    }
    assert found == DOORS


def test_another_door_would_be_found():
    assert _doors("def log(loss):\n    print(loss.reveal())\n") == ["log"]
    assert _doors("def log(loss):\n    return [p.reveal for p in loss]\n") == ["log"]
