"""Files of a state: every byte counts, and what was given comes back."""

import os
import random

import pytest
import torch
from safetensors.torch import save

from dpengine.run import state_file

STATE = {
    "numbers": {1: 0.1, "two": (2, None, True), "text": 'sha256":"0'},
    "tensors": [torch.arange(6.0).view(2, 3).t(), torch.ones((), dtype=torch.bfloat16)],
    "a": {"b.c": torch.zeros(1)},
    "a.b": {"c": torch.ones(1)},
    "nothing": {},
    "wide": float("inf"),
}


def same(a, b) -> bool:
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return type(a) is type(b) and len(a) == len(b) and all(map(same, a, b))
    return a == b and type(a) is type(b)


def test_a_state_comes_back_as_it_was(tmp_path):
    state_file.write(tmp_path / "state", STATE)
    assert same(state_file.read(str(tmp_path / "state")), STATE)


def test_equal_states_have_equal_bytes():
    assert state_file.encode(STATE) == state_file.encode(dict(STATE))


def test_each_byte_that_differs_is_refused():
    content = state_file.encode(STATE)
    chance = random.Random(0)
    for place in range(len(content)):
        bit = 1 << chance.randrange(8)
        with pytest.raises(ValueError):
            state_file.decode(
                content[:place] + bytes([content[place] ^ bit]) + content[place + 1 :]
            )
    for size in range(len(content)):
        with pytest.raises(ValueError):
            state_file.decode(content[:size])
    with pytest.raises(ValueError):
        state_file.decode(content + b" ")


def test_another_format_is_refused_by_name():
    content = state_file.encode(STATE).replace(b"dpengine state 1", b"dpengine state 2")
    place = content.index(b"sha256") + 12
    content = content[:place] + state_file._digest(content, place) + content[place + 64 :]
    with pytest.raises(ValueError, match="'dpengine state 2', and not 'dpengine state 1'"):
        state_file.decode(content)
    with pytest.raises(ValueError, match="digest"):
        state_file.decode(save({"weight": torch.ones(2)}))


def test_a_file_of_another_size_is_not_read(tmp_path, monkeypatch):
    """A terabyte in place of a checkpoint costs no memory."""
    file = tmp_path / "state"
    state_file.write(file, STATE)
    monkeypatch.setattr(os, "pread", lambda *_: pytest.fail("it was read"))
    os.truncate(file, 2**40)
    with pytest.raises(ValueError, match="has 1099511627776 bytes"):
        state_file.read(file)


@pytest.mark.parametrize("leaf", [{1}, object(), b"bytes"])
def test_objects_are_refused_and_named_by_their_place(tmp_path, leaf):
    with pytest.raises(TypeError, match=r"holds .* no objects, got a .* in 'of\.1'"):
        state_file.write(tmp_path / "state", {"of": [0, leaf]})
    assert not any(tmp_path.iterdir())
