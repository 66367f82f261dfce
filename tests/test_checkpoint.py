"""Checkpoints: whole or not at all, the last two, and no pickle."""

import os

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from dpengine.checkpoint import Checkpoint, read_latest, write, write_durably

OPTIMIZERS = {
    "adamw": lambda params: torch.optim.AdamW(params, lr=0.1, betas=(0.8, 0.99), amsgrad=True),
    "momentum": lambda params: torch.optim.SGD(params, lr=0.1, momentum=0.9, nesterov=True),
    "sgd": lambda params: torch.optim.SGD(params, lr=0.1),
}
each_optimizer = pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)


def step(params, optimizer, scheduler, number):
    generator = torch.Generator().manual_seed(number)
    for param in params:
        param.grad = torch.randn(param.shape, generator=generator)
    optimizer.step()
    scheduler.step()


def training(make):
    params = [nn.Parameter(torch.ones(3, 2)), nn.Parameter(torch.ones(4))]
    optimizer = make(params)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
    return params, optimizer, scheduler


NO_OPTIMIZER = {"state": {}, "param_groups": []}


def checkpoint(num_updates=1, value=1.0):
    return Checkpoint(num_updates, {"weight": torch.full((3,), value)}, NO_OPTIMIZER, {}, {}, 1.0)


@each_optimizer
def test_training_goes_on_bit_by_bit_after_a_round_trip(tmp_path, make):
    params, optimizer, scheduler = training(make)
    for number in range(3):
        step(params, optimizer, scheduler, number)
    tensors = {f"param.{i}": param.detach().clone() for i, param in enumerate(params)}
    write(tmp_path, Checkpoint(3, tensors, optimizer.state_dict(), scheduler.state_dict(), {}, 1.0))

    read = read_latest(tmp_path)
    assert read.num_updates == 3
    assert read.tensors.keys() == tensors.keys()
    resumed, new_optimizer, new_scheduler = training(make)
    with torch.no_grad():
        for i, param in enumerate(resumed):
            param.copy_(read.tensors[f"param.{i}"])
    new_optimizer.load_state_dict(read.optimizer)
    new_scheduler.load_state_dict(read.lr_scheduler)
    for number in range(3, 6):
        step(params, optimizer, scheduler, number)
        step(resumed, new_optimizer, new_scheduler, number)
    assert all(map(torch.equal, params, resumed))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.int64])
def test_tensors_keep_shape_dtype_and_bits(tmp_path, dtype):
    tensors = {
        "matrix": torch.arange(6).reshape(2, 3).to(dtype),
        "scalar": torch.ones((), dtype=dtype),
    }
    write(tmp_path, Checkpoint(1, tensors, NO_OPTIMIZER, {}, {}, 1.0))
    for name, tensor in read_latest(tmp_path).tensors.items():
        assert tensor.dtype == dtype and torch.equal(tensor, tensors[name])


def test_an_empty_folder_holds_no_checkpoint(tmp_path):
    assert read_latest(tmp_path) is None
    assert read_latest(tmp_path / "missing") is None


@pytest.mark.parametrize("first", [1, 8, 98, 999_998], ids="from={}".format)
def test_the_newest_is_read_and_only_the_last_two_are_kept(tmp_path, first):
    for num_updates in range(first, first + 4):
        write(tmp_path, checkpoint(num_updates, value=num_updates - first))
        assert read_latest(tmp_path).num_updates == num_updates
    assert read_latest(tmp_path).tensors["weight"].tolist() == [3.0] * 3
    assert len(list(tmp_path.iterdir())) == 2


def test_the_file_is_safetensors(tmp_path):
    write(tmp_path, checkpoint(value=2.0))
    (file,) = tmp_path.iterdir()
    assert load_file(file)["weight"].tolist() == [2.0] * 3


def damaged(content):
    half = len(content) // 2
    return {
        "empty": b"",
        "cut": content[:half],
        "one byte short": content[:-1],
        "zeros": bytes(len(content)),
        "text": b"not a checkpoint",
        "pickle": b"\x80\x04N.",
        "no metadata": content.replace(b"__metadata__", b"__motodoto__"),
        "no state": content.replace(b'"state"', b'"stake"'),
    }


@pytest.mark.parametrize("kind", damaged(b""))
def test_a_damaged_file_is_refused_with_its_name(tmp_path, kind):
    write(tmp_path, checkpoint())
    (file,) = tmp_path.iterdir()
    file.write_bytes(damaged(file.read_bytes())[kind])
    with pytest.raises(ValueError, match=f"{file}.*damaged"):
        read_latest(tmp_path)


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_crash_while_writing_leaves_the_checkpoint_before(tmp_path, monkeypatch, call):
    def crash(*_):
        raise OSError("power lost")

    write(tmp_path, checkpoint(1, value=1.0))
    with monkeypatch.context() as patch:
        patch.setattr(os, call, crash)
        with pytest.raises(OSError, match="power lost"):
            write(tmp_path, checkpoint(2, value=2.0))
    assert read_latest(tmp_path).num_updates == 1
    write(tmp_path, checkpoint(2, value=2.0))
    assert read_latest(tmp_path).num_updates == 2


def test_a_crash_while_overwriting_leaves_the_old_file(tmp_path, monkeypatch):
    file = tmp_path / "file"
    write_durably(file, b"old")

    def crash(*_):
        raise OSError("power lost")

    monkeypatch.setattr(os, "replace", crash)
    with pytest.raises(OSError, match="power lost"):
        write_durably(file, b"new")
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
    write_durably(file, b"content")
    assert events == [len(b"content"), "rename", "folder"]
    assert file.read_bytes() == b"content"
