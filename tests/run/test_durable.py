"""Files that matter: the old content or the new one, on disk when a call returns."""

import errno
import os
import re
import stat
import subprocess
import sys

import pytest

from dpengine.mechanism.plan import PrivacyPlan
from dpengine.run import durable
from dpengine.run.ledger import Ledger


def plan() -> PrivacyPlan:
    return PrivacyPlan(1.0, 1.0, 3, 1.0, 1e-5, 1000, "zero-out", 1, 100)


def test_a_crash_while_overwriting_leaves_the_old_file(tmp_path, monkeypatch):
    file = tmp_path / "file"
    durable.write(file, b"old")

    def crash(*_):
        raise OSError("power lost")

    monkeypatch.setattr(os, "replace", crash)
    with pytest.raises(OSError, match="power lost"):
        durable.write(file, b"new")
    assert file.read_bytes() == b"old"


def test_content_is_synced_before_the_rename_and_the_folder_after_it(tmp_path, monkeypatch):
    events, file = [], tmp_path / "file"
    fsync, replace = os.fsync, os.replace

    def recorded_fsync(descriptor):
        is_folder = os.fstat(descriptor).st_ino == tmp_path.stat().st_ino
        events.append("folder" if is_folder else os.fstat(descriptor).st_size)
        fsync(descriptor)

    def recorded_replace(source, target):
        events.append("rename")
        replace(source, target)

    monkeypatch.setattr(os, "fsync", recorded_fsync)
    monkeypatch.setattr(os, "replace", recorded_replace)
    durable.write(file, b"content")
    assert events == [len(b"content"), "rename", "folder"]
    assert file.read_bytes() == b"content"


def test_a_write_in_pieces_is_continued(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "write", lambda d, content, write=os.write: write(d, content[:3]))
    durable.write(tmp_path / "file", b"more than three bytes")
    assert (tmp_path / "file").read_bytes() == b"more than three bytes"


def test_a_write_that_goes_no_further_fails(tmp_path, monkeypatch):
    """A disk that takes nothing, and says so by zero, is no endless loop."""
    monkeypatch.setattr(os, "write", lambda *_: 0)
    with pytest.raises(OSError, match="the last 4 of 4 bytes"):
        durable.write(tmp_path / "file", b"four")
    assert list(tmp_path.iterdir()) == []


def test_what_an_earlier_crash_left_is_in_nobodys_way(tmp_path):
    (tmp_path / ".file.tmp").write_bytes(b"a longer content of an earlier attempt")
    durable.write(tmp_path / "file", b"new")
    assert [f.name for f in tmp_path.iterdir()] == ["file"]
    assert (tmp_path / "file").read_bytes() == b"new"


def test_a_link_at_the_temporary_name_is_not_followed(tmp_path):
    other = tmp_path / "other"
    other.write_bytes(b"not ours")
    (tmp_path / ".file.tmp").symlink_to(other)
    with pytest.raises(OSError) as error:
        durable.write(tmp_path / "file", b"new")
    assert error.value.errno == errno.ELOOP
    assert other.read_bytes() == b"not ours"


def test_a_file_beyond_its_size_is_not_read(tmp_path):
    file = tmp_path / "file"
    file.write_bytes(b"12345")
    assert durable.read(file) == durable.read(file, at_most=5) == b"12345"
    with pytest.raises(ValueError, match="has 5 bytes and should have at most 4"):
        durable.read(file, at_most=4)


def test_folders_are_made_and_each_name_synced(tmp_path, monkeypatch):
    synced = []

    def recorded(descriptor, fsync=os.fsync):
        fsync(descriptor)
        synced.append(os.readlink(f"/proc/self/fd/{descriptor}"))

    monkeypatch.setattr(os, "fsync", recorded)
    durable.make_folder(tmp_path / "a" / "b")
    assert synced == [str(tmp_path.parent), str(tmp_path), str(tmp_path / "a")]
    synced.clear()
    durable.make_folder(tmp_path / "a" / "b")  # whoever made it may have stopped before its sync
    assert synced == [str(tmp_path / "a")]


def test_a_log_is_never_overwritten(tmp_path):
    os.close(durable.create_log(tmp_path / "log", b"first"))
    with pytest.raises(FileExistsError):
        durable.create_log(tmp_path / "log", b"second")
    assert (tmp_path / "log").read_bytes() == b"first"


@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOTSUP, errno.EACCES, errno.ENOSYS])
def test_a_file_system_that_cannot_sync_folders_is_worked_with(tmp_path, monkeypatch, number):
    """SMB and some of FUSE. Contents are synced still."""
    synced = []

    def fsync(descriptor):
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(number, os.strerror(number))
        synced.append(os.fstat(descriptor).st_size)

    monkeypatch.setattr(os, "fsync", fsync)
    durable.make_folder(tmp_path / "a")
    durable.write(tmp_path / "a" / "file", b"content")
    assert synced == [len(b"content")]


@pytest.mark.parametrize("number", [errno.EIO, errno.ENOSPC, errno.EDQUOT])
def test_a_folder_that_a_disk_fails_to_sync_is_an_error_that_names_it(
    tmp_path, monkeypatch, number
):
    def fsync(descriptor):
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(OSError, match=re.escape(f"'{tmp_path}'")) as error:
        durable.write(tmp_path / "file", b"content")
    assert error.value.errno == number


@pytest.mark.parametrize("call", ["write", "fsync"])
def test_an_error_of_a_descriptor_names_its_file(tmp_path, monkeypatch, call):
    def fail(*args):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    log = tmp_path / "log"
    ledger = Ledger.create(log, plan())
    monkeypatch.setattr(os, call, fail)
    with pytest.raises(OSError, match=re.escape(str(tmp_path / "file"))):
        durable.write(tmp_path / "file", b"content")
    with pytest.raises(OSError, match=re.escape(str(tmp_path / "new"))):
        durable.create_log(tmp_path / "new", b"content")
    with pytest.raises(OSError, match=re.escape(str(log))):
        ledger.reserve()


def test_a_folder_in_the_place_of_a_file_is_named(tmp_path):
    with pytest.raises(IsADirectoryError, match=re.escape(str(tmp_path))):
        durable.read(tmp_path)


@pytest.mark.parametrize("missing", ["O_NOFOLLOW", "pread", "fork"])
def test_a_system_without_what_files_need_is_refused_in_a_sentence(tmp_path, monkeypatch, missing):
    """Windows has none of the three."""
    file = tmp_path / "file"
    file.write_bytes(b"content")
    monkeypatch.delattr(os, missing)
    uses = [
        lambda: durable.write(file, b""),
        lambda: durable.create_log(tmp_path / "log", b""),
        lambda: durable.open_log(file),
        lambda: durable.read(file),
        lambda: durable.check_new_file("output", "x.npz"),
    ]
    for use in uses:
        with pytest.raises(OSError, match="Windows work in WSL"):
            use()


def test_the_package_is_imported_where_there_is_no_fcntl_and_no_fork():
    """So that the sentence can be said at all."""
    code = (
        "import os, signal, sys, torch, diffusers, peft, sklearn, tyro\n"
        "sys.modules['fcntl'] = None\n"
        "del os.register_at_fork, os.O_NOFOLLOW, os.pread, os.fork, signal.SIGHUP\n"
        "from dpengine import finetune\n"
        "raise SystemExit(finetune.main([]))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd="/")
    assert done.returncode == 2, done.stderr
    assert done.stderr.splitlines()[-1].startswith("error: runs need Linux or macOS")
