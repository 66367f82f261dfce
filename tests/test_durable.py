"""Files that matter: the old content or the new one, on disk when a call returns."""

import errno
import os

import pytest

from dpengine import durable


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
