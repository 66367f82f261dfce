"""Files that matter: the old content or the new one, on disk when a call returns."""

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
