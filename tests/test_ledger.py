"""The ledger: never fewer steps on disk than were drawn."""

import json
import math
import os

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dpengine.errors import PrivacyError
from dpengine.ledger import Ledger
from dpengine.plan import PrivacyPlan

PLAN = PrivacyPlan(
    sampling_rate=0.1 + 0.2,
    noise_multiplier=math.pi,
    num_steps=5,
    max_grad_norm=0.1,
    delta=1e-4,
    public_dataset_size=1437,
    adjacency="zero-out",
    draws_per_record=4,
    trainable_parameters=100,
)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "ledger.jsonl"


def filled(path, reserved):
    ledger = Ledger.create(path, PLAN)
    for _ in range(reserved):
        ledger.reserve()
    return ledger


def lines(path):
    return path.read_bytes().splitlines(keepends=True)


@pytest.mark.parametrize("reserved", [0, 1, 5])
def test_reopening_counts_every_reserved_step(path, reserved):
    filled(path, reserved)
    ledger = Ledger.open(path)
    assert (ledger.reserved, ledger.remaining) == (reserved, 5 - reserved)


def test_the_plan_survives_to_the_last_bit(path):
    filled(path, 2)
    assert Ledger.open(path).plan == PLAN


def test_each_line_states_the_step_and_its_mechanism(path):
    filled(path, 3)
    for step, line in enumerate(lines(path)[1:], start=1):
        entry = json.loads(line)
        assert entry["step"] == step
        for name in ("sampling_rate", "noise_multiplier", "max_grad_norm"):
            assert entry[name] == getattr(PLAN, name)


def test_a_step_is_on_disk_and_synced_when_reserve_returns(path, monkeypatch):
    ledger, synced = filled(path, 1), []

    def recorded(descriptor, fsync=os.fsync):
        fsync(descriptor)
        synced.append((os.fstat(descriptor).st_ino, path.read_bytes()))

    monkeypatch.setattr(os, "fsync", recorded)
    monkeypatch.setattr(os, "fdatasync", recorded)
    for step in (2, 3):
        ledger.reserve()
        inode, content = synced.pop()
        assert inode == path.stat().st_ino
        assert content == path.read_bytes()
        assert json.loads(lines(path)[-1])["step"] == step


def test_the_file_and_its_folder_are_synced_when_create_returns(path, monkeypatch):
    synced = []

    def recorded(descriptor, fsync=os.fsync):
        fsync(descriptor)
        synced.append(os.fstat(descriptor).st_ino)

    monkeypatch.setattr(os, "fsync", recorded)
    Ledger.create(path, PLAN)
    assert {path.stat().st_ino, path.parent.stat().st_ino} <= set(synced)


def test_a_step_that_could_not_be_synced_is_not_granted(path, monkeypatch):
    def fail(descriptor):
        raise OSError("disk full")

    ledger = filled(path, 1)
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fail)
        with pytest.raises(OSError, match="disk full"):
            ledger.reserve()
    ledger.close()
    assert Ledger.open(path).reserved >= 1


def test_no_step_beyond_the_plan_is_granted_or_written(path):
    ledger = filled(path, 5)
    before = path.read_bytes()
    for _ in range(2):
        with pytest.raises(PrivacyError, match="5 planned steps"):
            ledger.reserve()
        assert ledger.reserved == 5
        ledger.close()
        ledger = Ledger.open(path)
    assert path.read_bytes() == before


def test_all_attempts_together_never_pass_the_plan(path):
    filled(path, 2)
    Ledger.open(path).reserve()
    last = Ledger.open(path)
    last.reserve()
    last.reserve()
    with pytest.raises(PrivacyError):
        last.reserve()
    assert [json.loads(line)["step"] for line in lines(path)[1:]] == [1, 2, 3, 4, 5]


@given(data=st.data())
@settings(deadline=None, max_examples=60)
def test_a_file_cut_anywhere_counts_its_whole_lines_and_goes_on(tmp_path_factory, data):
    path = tmp_path_factory.mktemp("ledger") / "ledger.jsonl"
    filled(path, 3)
    header, content = len(lines(path)[0]), path.read_bytes()
    keep = data.draw(st.integers(header, len(content)))
    path.write_bytes(content[:keep])
    whole = content[:keep].count(b"\n") - 1
    ledger = Ledger.open(path)
    assert ledger.reserved == whole
    ledger.reserve()
    ledger.close()
    assert Ledger.open(path).reserved == whole + 1


def test_two_cannot_work_with_one_ledger(path):
    first = Ledger.create(path, PLAN)
    with pytest.raises(PrivacyError, match="in use by another process"):
        Ledger.open(path)
    first.reserve()
    first.close()
    assert Ledger.open(path).reserved == 1


def test_a_torn_line_is_cut_from_the_file(path):
    filled(path, 2)
    whole = path.read_bytes()
    path.write_bytes(whole + b'{"step": 3, "samp')
    assert Ledger.open(path).reserved == 2
    assert path.read_bytes() == whole


def without_plan(lines):
    return lines[1:]


def damaged_line(lines):
    return [*lines[:2], b'{"step": 2, "sam\n', *lines[3:]]


def binary_line(lines):
    return [*lines[:2], b"\x00\xff\xfe\n", *lines[3:]]


def missing_line(lines):
    return [*lines[:2], *lines[3:]]


def repeated_line(lines):
    return [*lines, lines[-1]]


def swapped_lines(lines):
    return [lines[0], lines[2], lines[1], lines[3]]


def first_line_missing(lines):
    return [lines[0], *lines[2:]]


def no_step(lines):
    return [*lines, b"{}\n"]


def empty_line(lines):
    return [*lines[:2], b"\n", *lines[2:]]


def empty_file(lines):
    return []


def bad_plan(lines):
    plan = PLAN.to_dict() | {"sampling_rate": 2.0}
    return [json.dumps({"plan": plan}).encode() + b"\n", *lines[1:]]


def unknown_field(lines):
    plan = PLAN.to_dict() | {"seed": 1}
    return [json.dumps({"plan": plan}).encode() + b"\n", *lines[1:]]


@pytest.mark.parametrize(
    "damage",
    [
        without_plan,
        damaged_line,
        binary_line,
        missing_line,
        repeated_line,
        swapped_lines,
        first_line_missing,
        no_step,
        empty_line,
        empty_file,
        bad_plan,
        unknown_field,
    ],
    ids=lambda damage: damage.__name__,
)
def test_a_damaged_ledger_is_refused_and_left_as_it_is(path, damage):
    filled(path, 3)
    content = b"".join(damage(lines(path)))
    path.write_bytes(content)
    with pytest.raises(PrivacyError, match="damaged"):
        Ledger.open(path)
    assert path.read_bytes() == content


def test_a_ledger_is_never_overwritten(path):
    filled(path, 3)
    before = path.read_bytes()
    with pytest.raises(FileExistsError):
        Ledger.create(path, PLAN)
    assert path.read_bytes() == before
