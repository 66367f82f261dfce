"""Checkpoints: whole or not at all, the last two, and no pickle."""

import os
import re

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from dpengine.run import state_file
from dpengine.run.checkpoint import Checkpoint, read_latest, write

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
    tensors = {"weight": torch.full((3,), value)}
    return Checkpoint(num_updates, tensors, NO_OPTIMIZER, {}, {}, 1.0, "head", num_updates)


def files(folder):
    return sorted(file.name for file in folder.iterdir())


@each_optimizer
def test_training_goes_on_bit_by_bit_after_a_round_trip(tmp_path, make):
    params, optimizer, scheduler = training(make)
    for number in range(3):
        step(params, optimizer, scheduler, number)
    tensors = {f"param.{i}": param.detach().clone() for i, param in enumerate(params)}
    states = optimizer.state_dict(), scheduler.state_dict(), {}, 1.0
    write(tmp_path, Checkpoint(3, tensors, *states, "head", 3))

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
    write(tmp_path, Checkpoint(1, tensors, NO_OPTIMIZER, {}, {}, 1.0, "head", 1))
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
    last = [f"step-{n:06d}" for n in (first + 2, first + 3)]
    assert files(tmp_path) == [name + ".safetensors" for name in last]


def test_a_file_is_of_safetensors(tmp_path):
    write(tmp_path, checkpoint(value=2.0))
    assert files(tmp_path) == ["step-000001.safetensors"]
    tensors = load_file(tmp_path / "step-000001.safetensors")
    assert tensors["tensors.weight"].tolist() == [2.0] * 3


def test_what_a_crash_has_left_is_no_generation_and_goes(tmp_path):
    write(tmp_path, checkpoint(1))
    (tmp_path / ".step-000002.safetensors.tmp").write_bytes(b"left by a crash")
    assert read_latest(tmp_path).num_updates == 1
    write(tmp_path, checkpoint(3))
    assert files(tmp_path) == ["step-000001.safetensors", "step-000003.safetensors"]


def test_writing_a_step_again_is_never_a_mix_of_both(tmp_path, monkeypatch):
    write(tmp_path, checkpoint(1, value=1.0))
    write(tmp_path, checkpoint(2, value=2.0))

    def fail(source, target):
        raise OSError("power lost")

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", fail)
        with pytest.raises(OSError, match="power lost"):
            write(tmp_path, checkpoint(2, value=3.0))
    assert read_latest(tmp_path).tensors["weight"].tolist() == [2.0] * 3
    write(tmp_path, checkpoint(2, value=3.0))
    assert read_latest(tmp_path).tensors["weight"].tolist() == [3.0] * 3


def damaged(content):
    half = len(content) // 2
    return {
        "empty": b"",
        "cut": content[:half],
        "one byte short": content[:-1],
        "one byte more": content + b"\n",
        "zeros": bytes(len(content)),
        "text": b"not a checkpoint",
        "pickle": b"\x80\x04N.",
        "one bit": bytes([*content[:half], content[half] ^ 1, *content[half + 1 :]])
        if content
        else b"",
    }


@pytest.mark.parametrize("kind", damaged(b""))
def test_the_way_out_of_a_damaged_generation_is_the_one_before(tmp_path, kind):
    """The error names the damaged file; without it the one before is read."""
    write(tmp_path, checkpoint(1, value=1.0))
    write(tmp_path, checkpoint(2, value=2.0))
    file = tmp_path / "step-000002.safetensors"
    file.write_bytes(damaged(file.read_bytes())[kind])
    with pytest.raises(ValueError, match="is damaged") as error:
        read_latest(tmp_path)
    said = re.search(r"checkpoint (\S+) is .* remove it to go on from (\S+):", str(error.value))
    assert said[1] == str(file)
    assert said[2] == "step-000001.safetensors"
    file.unlink()
    read = read_latest(tmp_path)
    assert (read.num_updates, read.tensors["weight"].tolist()) == (1, [1.0] * 3)


def test_the_way_out_of_a_single_damaged_generation_is_the_start(tmp_path):
    write(tmp_path, checkpoint(1))
    file = tmp_path / "step-000001.safetensors"
    file.write_bytes(b"")
    with pytest.raises(ValueError, match=r"remove it to go on from the start"):
        read_latest(tmp_path)
    file.unlink()
    assert read_latest(tmp_path) is None


@pytest.mark.parametrize("change", ["renamed", "another state"])
def test_a_file_that_is_no_checkpoint_of_its_step_is_refused(tmp_path, change):
    write(tmp_path, checkpoint(1))
    file = tmp_path / "step-000001.safetensors"
    if change == "renamed":
        file.rename(tmp_path / "step-000009.safetensors")
    else:
        state_file.write(file, {"num_updates": 1})
    with pytest.raises(ValueError, match="is damaged"):
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
