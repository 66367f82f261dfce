"""Bytes of ledger and checkpoint that differ: a clean error, or a torn line is cut."""

import json
import random
import re

import pytest
import torch

from dpengine.errors import PrivacyError
from dpengine.mechanism.plan import PrivacyPlan
from dpengine.run import ledger
from dpengine.run.checkpoint import Checkpoint, read_latest, write
from dpengine.run.ledger import Ledger

PLAN = PrivacyPlan(
    sampling_rate=0.3,
    noise_multiplier=1.1,
    num_steps=6,
    max_grad_norm=0.1,
    delta=1e-4,
    public_dataset_size=1437,
    adjacency="zero-out",
    draws_per_record=4,
    trainable_parameters=100,
)


def mutated(content: bytes, chance: random.Random) -> bytes:
    """One bit or byte other than it was, bytes put in or taken out, or the end cut off."""
    at = chance.randrange(len(content))
    some = chance.randbytes(chance.choice((1, 1, 2, 7)))
    changed = [
        content[:at] + bytes([content[at] ^ 1 << chance.randrange(8)]) + content[at + 1 :],
        content[:at] + some + content[at + len(some) :],
        content[:at] + some + content[at:],
        content[:at] + chance.choice((b"\n", b" ", b"0", b'"')) + content[at:],
        content[:at] + content[at + len(some) :],
        content[:at],
        content + some,
    ]
    return chance.choice([other for other in changed if other != content])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A ledger of four steps and its seal, and two generations of checkpoints."""
    folder = tmp_path_factory.mktemp("run")
    book = Ledger.create(folder / "ledger.jsonl", PLAN)
    for step in (1, 2, 3, 4):
        book.reserve()
        tensors = {"weight.0": torch.full((4, 3), float(step)), "average.0": torch.ones(2)}
        optimizer = {
            "state": {0: {"momentum_buffer": torch.ones(4)}},
            "param_groups": [{"lr": 0.5}],
        }
        state = Checkpoint(step, tensors, optimizer, {"last_epoch": step}, {}, 0.1, book.head, step)
        write(folder / "checkpoints", state)
    book.seal({"privacy_report.json": "0" * 64})
    book.close()
    return folder


def check_ledger(folder, original: bytes, content: bytes) -> None:
    """It is refused as it is, or what opens is its whole lines, all of them as they were written.

    Lines that are missing at the end are seen by the checkpoint that was written with them.
    """
    file = folder / "ledger.jsonl"
    file.write_bytes(content)
    try:
        record = ledger.read(file)
    except PrivacyError as error:
        assert "is damaged" in str(error)
        with pytest.raises(PrivacyError, match="is damaged"):
            Ledger.open(file)
        assert file.read_bytes() == content
        return
    opened = Ledger.open(file)
    whole = file.read_bytes()
    # A last line that lost nothing but its newline is whole.
    assert whole in (content[: content.rfind(b"\n") + 1], content + b"\n")
    assert original.startswith(whole)
    steps = [json.loads(line) for line in whole.splitlines()[1:]]
    assert opened.reserved == record.reserved == sum("step" in line for line in steps)
    state = read_latest(folder / "checkpoints")
    assert opened.holds(state.ledger_head, state.reserved) == (opened.reserved == 4)
    opened.close()


def check_checkpoint(folder, name: str, content: bytes) -> None:
    """It is refused with its name, whatever differs; without it the one before is read."""
    file = folder / "checkpoints" / name
    file.write_bytes(content)
    with pytest.raises(ValueError, match=re.escape(f"{file} is damaged")):
        read_latest(folder / "checkpoints")
    file.rename(file.with_name("hidden"))
    assert read_latest(folder / "checkpoints").num_updates == 3


def check_mutations(folder, number: int, seed: int) -> None:
    chance = random.Random(seed)
    names = ["ledger.jsonl", "checkpoints/step-000004.safetensors"]
    originals = {name: (folder / name).read_bytes() for name in names}
    for _ in range(number):
        name = chance.choice(names)
        content = mutated(originals[name], chance)
        if name == "ledger.jsonl":
            check_ledger(folder, originals[name], content)
        else:
            check_checkpoint(folder, name.removeprefix("checkpoints/"), content)
        (folder / name).write_bytes(originals[name])
    assert read_latest(folder / "checkpoints").num_updates == 4
    assert ledger.read(folder / "ledger.jsonl").reserved == 4


def test_a_few_mutations(folder):
    check_mutations(folder, 150, seed=-1)


@pytest.mark.slow
def test_ten_thousand_mutations(folder):
    check_mutations(folder, 10_000, seed=0)
