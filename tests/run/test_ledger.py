"""The ledger: never fewer steps on disk than were drawn."""

import dataclasses
import functools
import hashlib
import json
import math
import os
import random
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dpengine.errors import PrivacyError
from dpengine.mechanism.plan import PrivacyPlan
from dpengine.run import digests, ledger
from dpengine.run.ledger import Ledger, block_size

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
        assert (entry["step"], entry["num_steps"]) == (step, 1)
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
    # A line that only its newline is missing of was perhaps synced, and counts.
    whole = (content[:keep] + b"\n" * (content[keep : keep + 1] == b"\n")).count(b"\n") - 1
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


def chained(contents):
    """Lines with digests that are right, whatever they say."""
    lines, head = [], None
    for content in contents:
        previous = {} if head is None else {"previous": head}
        line, head = digests.encode(previous | content)
        lines.append(line)
    return lines


ATTEMPT = 32 * "0"


def header(**fields):
    return {"plan": PLAN.to_dict() | fields, "config_sha256": ""}


def entry(step, **fields):
    mechanism = ("sampling_rate", "noise_multiplier", "max_grad_norm")
    line = {"step": step, "num_steps": 1} | {name: getattr(PLAN, name) for name in mechanism}
    return line | {"attempt": ATTEMPT} | fields


def test_lines_of_this_test_are_those_of_the_ledger(path, monkeypatch):
    monkeypatch.setattr(os, "urandom", lambda size: bytes(size))
    filled(path, 2)
    assert lines(path) == chained([header(), entry(1), entry(2)])


def bad_plan(lines):
    return chained([header(sampling_rate=2.0)])


def unknown_field(lines):
    return chained([header(seed=1)])


def other_noise(lines):
    return chained([header(), entry(1, noise_multiplier=3.0)])


def other_rate(lines):
    return chained([header(), entry(1, sampling_rate=0.2)])


def other_bound(lines):
    return chained([header(), entry(1, max_grad_norm=0.05)])


def gap(lines):
    return chained([header(), entry(1), entry(3)])


def block_of_two(lines):
    return chained([header(), entry(1, num_steps=2)])


def block_of_none(lines):
    return chained([header(), entry(1, num_steps=0)])


def beyond_the_plan(lines):
    return chained([header(), *map(entry, range(1, 7))])


def of_another_plan(lines):
    """Lines that are whole and say the same mechanism, behind another header."""
    return [*chained([header(delta=2e-4)]), *lines[1:]]


def of_another_past(lines):
    """The third line is whole, and follows a second line that says the same otherwise."""
    return [*chained([header(), entry(1)]), *chained([header(delta=2e-4), entry(1), entry(2)])[2:]]


def goes_on_after_its_seal(lines):
    return chained([header(), entry(1), {"seal": {}}, entry(2)])


def no_newline(lines):
    return [b"".join(lines)[:-1].replace(b"\n", b" ")]


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
        other_noise,
        other_rate,
        other_bound,
        gap,
        block_of_two,
        block_of_none,
        beyond_the_plan,
        of_another_plan,
        of_another_past,
        goes_on_after_its_seal,
        no_newline,
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


def test_each_line_holds_the_digest_of_the_one_before(path):
    """SHA-256 of the line as JSON without its last field, which is that digest."""
    opened = filled(path, 3)
    previous = None
    for line in lines(path):
        content = json.loads(line)
        assert content.get("previous") == previous
        digest = content.pop("sha256")
        assert digest == hashlib.sha256(json.dumps(content).encode()).hexdigest()
        previous = digest
    assert opened.head == previous


def test_a_long_run_has_a_thousand_blocks_at_most():
    """The size is the smallest with which a thousand lines hold the plan."""
    for num_steps in (1, 999, 1000, 1001, 2000, 2001, 14_062, 10**6):
        plan = dataclasses.replace(PLAN, num_steps=num_steps)
        size = block_size(plan)
        assert size * 1000 >= num_steps and (size == 1 or (size - 1) * 1000 < num_steps)
        assert block_size(dataclasses.replace(plan, clipping="adaptive")) == 1


@pytest.mark.parametrize("num_steps", [1001, 2999])
def test_attempts_with_blocks_charge_what_they_draw_and_less_than_a_block_more(path, num_steps):
    plan = dataclasses.replace(PLAN, num_steps=num_steps)
    chance, size, drawn, lost = random.Random(num_steps), -(-num_steps // 1000), 0, 0
    Ledger.create(path, plan).close()
    is_spent = False
    while not is_spent:
        opened = Ledger.open(path)
        assert opened.reserved == drawn + lost and opened.remaining == num_steps - drawn - lost
        steps = chance.choice((0, 1, 2, num_steps // 7, num_steps // 3))
        granted = min(steps, opened.remaining)
        for _ in range(granted):
            opened.reserve()
        drawn += granted
        assert drawn + lost <= opened.reserved <= num_steps
        assert opened.reserved - drawn - lost < size
        assert opened.remaining == num_steps - drawn - lost
        if granted < steps:
            is_spent = True
            with pytest.raises(PrivacyError, match="exceed the budget"):
                opened.reserve()
        lost = opened.reserved - drawn
        opened.close()
    record = ledger.read(path)
    assert record.reserved == num_steps
    covered = [s for b in record.reservations for s in range(b.step, b.step + b.num_steps)]
    assert covered == list(range(1, num_steps + 1))


def test_a_bound_that_moves_is_charged_step_by_step_and_only_where_clipping_is_adaptive(path):
    plan = dataclasses.replace(PLAN, num_steps=5000, clipping="adaptive")
    adaptive = Ledger.create(path, plan)
    for bound in (0.1, 0.2, 0.3):
        adaptive.reserve(bound)
    assert [line.max_grad_norm for line in ledger.read(path).reservations] == [0.1, 0.2, 0.3]
    adaptive.close()
    path.unlink()
    flat = Ledger.create(path, PLAN)
    with pytest.raises(PrivacyError, match="only adaptive clipping moves it"):
        flat.reserve(0.2)
    for bound in (0.0, -1.0, math.nan, math.inf):
        with pytest.raises(ValueError, match="max_grad_norm"):
            flat.reserve(bound)
    assert flat.reserved == 0 and len(lines(path)) == 1


def test_reading_takes_no_lock_and_changes_nothing(path):
    opened = filled(path, 3)
    opened.seal({"report": "12"})
    with path.open("ab") as file:
        file.write(b'{"torn')
    before = path.read_bytes()
    record = ledger.read(path)
    assert path.read_bytes() == before
    assert (record.plan, record.config_digest, record.reserved) == (PLAN, "", 3)
    assert (record.head, record.seal) == (opened.head, {"report": "12"})
    assert [line.step for line in record.reservations] == [1, 2, 3]


def test_the_last_seal_counts_and_nothing_is_charged_after_one(path):
    opened = filled(path, 2)
    assert ledger.read(path).seal is None
    opened.seal({"a": "1"})
    opened.seal({"a": "2", "b": "3"})
    assert ledger.read(path).seal == {"a": "2", "b": "3"}
    for again in (opened, None):
        again = again or Ledger.open(path)
        with pytest.raises(PrivacyError, match="released"):
            again.reserve()
        again.close()
    assert ledger.read(path).reserved == 2


def test_heads_tell_a_ledger_from_one_that_was_rolled_back(path):
    opened = filled(path, 2)
    head, content = opened.head, path.read_bytes()
    opened.reserve()
    assert opened.holds(head, 2) and not opened.holds(head, 3)
    later = opened.head
    opened.close()
    again = Ledger.open(path)
    assert again.holds(head, 2) and again.holds(later, 3)
    again.close()
    path.write_bytes(content)
    assert not Ledger.open(path).holds(later, 3)


def test_after_a_write_that_failed_nothing_more_is_granted(path, monkeypatch):
    """Half of a line is there; whether it was synced is unknown. A new attempt cuts it."""
    opened = filled(path, 2)

    def fail(descriptor, content, write=os.write):
        if len(content) < 100:
            raise OSError("disk full")
        return write(descriptor, content[:-50])

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", fail)
        with pytest.raises(OSError, match="disk full"):
            opened.reserve()
    for _ in range(2):
        with pytest.raises(PrivacyError, match="could not be written"):
            opened.reserve()
    opened.close()
    again = Ledger.open(path)
    assert again.reserved == 2
    again.reserve()
    assert ledger.read(path).reserved == 3


def test_a_write_in_pieces_is_continued(path, monkeypatch):
    opened = filled(path, 1)
    with monkeypatch.context() as patch:
        patch.setattr(os, "write", lambda d, content, write=os.write: write(d, content[:7]))
        opened.reserve()
    assert ledger.read(path).reserved == 2


def changed_by_another(path, content):
    path.write_bytes(content + content.splitlines(keepends=True)[-1])


def replaced(path, content):
    copy = path.with_name("copy")
    copy.write_bytes(content)
    copy.rename(path)


def removed(path, content):
    path.unlink()


def moved_and_copied(path, content):
    path.rename(path.with_name("old"))
    path.write_bytes(content)


def removed_with_another_name(path, content):
    os.link(path, path.with_name("backup"))
    path.unlink()


def behind_another_link(path, content):
    path.rename(path.with_name("old"))
    path.with_name("other").write_bytes(content)
    path.symlink_to(path.with_name("other"))


CHANGES = [
    changed_by_another,
    replaced,
    removed,
    moved_and_copied,
    removed_with_another_name,
    behind_another_link,
]


@pytest.mark.parametrize("change", CHANGES)
def test_a_ledger_that_is_not_at_its_place_grants_nothing(path, change):
    """A copy put back, say: what is charged to a file without a name is charged to none."""
    opened = filled(path, 2)
    change(path, path.read_bytes())
    with pytest.raises(PrivacyError, match="changed, moved or replaced"):
        opened.reserve()
    with pytest.raises(PrivacyError, match="changed, moved or replaced"):
        opened.seal({})


def test_a_last_line_that_lost_its_newline_counts(path):
    """It may have been synced, and its step drawn."""
    filled(path, 3).close()
    whole = path.read_bytes()
    path.write_bytes(whole[:-1])
    assert ledger.read(path).reserved == 3 and not ledger.read(path).is_torn
    opened = Ledger.open(path)
    assert opened.reserved == 3
    assert path.read_bytes() == whole
    opened.reserve()
    assert ledger.read(path).reserved == 4


def test_no_two_pasts_have_one_digest(path):
    """A copy that is put back and goes on again is told from what it was."""
    filled(path, 2).close()
    backup, heads = path.read_bytes(), set()
    for _ in range(2):
        path.write_bytes(backup)
        opened = Ledger.open(path)
        opened.reserve()
        heads.add(opened.head)
        opened.close()
    assert len(heads) == 2


@pytest.mark.parametrize("seal", ["abc", [1], {"report": 1}, None])
def test_a_seal_that_is_none_is_refused(path, seal):
    path.write_bytes(b"".join(chained([header(), entry(1), {"seal": seal}])))
    with pytest.raises(PrivacyError, match="damaged"):
        ledger.read(path)


@pytest.mark.parametrize("value", ["x", -1.0, math.nan, None, True])
def test_a_bound_that_is_no_number_is_refused(path, value):
    plan = dataclasses.replace(PLAN, clipping="adaptive")
    lines = [{"plan": plan.to_dict(), "config_sha256": ""}, entry(1, max_grad_norm=value)]
    path.write_bytes(b"".join(chained(lines)))
    with pytest.raises(PrivacyError, match="damaged"):
        ledger.read(path)


def in_children(*functions) -> list[str]:
    """What children of a fork return, all at work at once, or the errors that they ended with."""
    readers, children = [], []
    for function in functions:
        reader, writer = os.pipe()
        readers.append(reader)
        children.append(os.fork())
        if children[-1] == 0:
            try:
                text = str(function())
            except BaseException as error:
                text = f"{type(error).__name__}: {error}"
            os.write(writer, text.encode())
            os._exit(0)
        os.close(writer)
    texts = []
    for reader, child in zip(readers, children, strict=True):
        with os.fdopen(reader) as file:
            texts.append(file.read())
        os.waitpid(child, 0)
    return texts


@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
def test_a_fork_cannot_charge_for_its_parent(path):
    opened = filled(path, 1)
    (message,) = in_children(opened.reserve)
    assert message.startswith("PrivacyError: a ledger is its process's own")
    opened.reserve()
    assert ledger.read(path).reserved == 2


@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
def test_a_second_process_is_refused_while_the_first_works(path):
    opened = filled(path, 1)
    (message,) = in_children(lambda: Ledger.open(path))
    assert message.startswith(f"PrivacyError: ledger {path} is in use by another process")
    opened.close()
    assert in_children(lambda: Ledger.open(path).reserved) == ["1"]


def spend(path, seed) -> list[int]:
    """Take the ledger again and again, when it is free, for a few steps. The steps granted."""
    chance, granted = random.Random(seed), []
    while True:
        try:
            opened = Ledger.open(path)
        except PrivacyError as error:
            assert "in use" in str(error)
            time.sleep(0.0005 * chance.random())
            continue
        for _ in range(chance.randint(1, 3)):
            if opened.remaining == 0:
                return granted
            opened.reserve()
            granted.append(opened.reserved)
        opened.close()


@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
def test_processes_that_share_a_ledger_lose_no_line_and_pass_no_budget(path):
    """Four of them; every planned step is granted to exactly one."""
    plan = dataclasses.replace(PLAN, num_steps=100)
    Ledger.create(path, plan).close()
    grants = in_children(*(functools.partial(spend, path, seed) for seed in range(4)))
    granted = sorted(step for text in grants for step in json.loads(text))
    assert granted == list(range(1, 101))
    assert ledger.read(path).reserved == 100
