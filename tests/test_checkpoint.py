"""Checkpoints: whole or not at all, the last two, and no pickle."""

import hashlib
import json
import os
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from dpengine import digests, durable
from dpengine.checkpoint import Checkpoint, read_latest, write

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
    assert files(tmp_path) == sorted(n + end for n in last for end in (".json", ".safetensors"))


def test_the_files_are_safetensors_and_json(tmp_path):
    write(tmp_path, checkpoint(value=2.0))
    assert files(tmp_path) == ["step-000001.json", "step-000001.safetensors"]
    assert load_file(tmp_path / "step-000001.safetensors")["weight"].tolist() == [2.0] * 3
    manifest = json.loads((tmp_path / "step-000001.json").read_text())
    content = (tmp_path / "step-000001.safetensors").read_bytes()
    sha256 = hashlib.sha256(content).hexdigest()
    described = {"size": len(content), "sha256": sha256}
    assert manifest["files"] == {"step-000001.safetensors": described}
    assert (manifest["ledger_head"], manifest["reserved"]) == ("head", 1)


def test_a_generation_without_its_manifest_is_none(tmp_path):
    write(tmp_path, checkpoint(1))
    write(tmp_path, checkpoint(2))
    (tmp_path / "step-000002.json").unlink()
    assert read_latest(tmp_path).num_updates == 1
    (tmp_path / ".step-000002.json.tmp").write_bytes(b"left by a crash")
    write(tmp_path, checkpoint(3))
    assert [name[:11] for name in files(tmp_path)] == ["step-000001"] * 2 + ["step-000003"] * 2


def test_writing_a_step_again_is_never_a_mix_of_both(tmp_path, monkeypatch):
    """At each rename that fails the newest generation is whole: step 1, or either step 2."""
    write(tmp_path, checkpoint(1, value=1.0))
    write(tmp_path, checkpoint(2, value=2.0))
    for good in range(2):
        renames = []

        def replace(source, target, good=good, renames=renames, replace=os.replace):
            if len(renames) == good:
                raise OSError("power lost")
            renames.append(target)
            replace(source, target)

        with monkeypatch.context() as patch:
            patch.setattr(os, "replace", replace)
            with pytest.raises(OSError, match="power lost"):
                write(tmp_path, checkpoint(2, value=3.0))
        assert read_latest(tmp_path).tensors["weight"].tolist() == [1.0] * 3
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


@pytest.mark.parametrize("kind", [*damaged(b""), "missing"])
@pytest.mark.parametrize("ending", ["json", "safetensors"])
def test_the_way_out_of_a_damaged_generation_is_the_one_before(tmp_path, kind, ending):
    """The error names the damaged file and the one to remove; then the one before is read."""
    write(tmp_path, checkpoint(1, value=1.0))
    write(tmp_path, checkpoint(2, value=2.0))
    file = tmp_path / f"step-000002.{ending}"
    if kind != "missing":
        file.write_bytes(damaged(file.read_bytes())[kind])
    elif ending == "json":
        return  # a generation without its manifest is none
    else:
        file.unlink()
    with pytest.raises(ValueError, match="is damaged") as error:
        read_latest(tmp_path)
    said = re.search(r"checkpoint (\S+) is .* remove (\S+) to go on from (\S+):", str(error.value))
    assert said[1] == str(file)
    assert said[3] == "step-000001.json"
    Path(said[2]).unlink()
    read = read_latest(tmp_path)
    assert (read.num_updates, read.tensors["weight"].tolist()) == (1, [1.0] * 3)


def test_the_way_out_of_a_single_damaged_generation_is_the_start(tmp_path):
    write(tmp_path, checkpoint(1))
    (tmp_path / "step-000001.safetensors").write_bytes(b"")
    with pytest.raises(ValueError, match=r"remove (\S+) to go on from the start") as error:
        read_latest(tmp_path)
    Path(re.search(r"remove (\S+) to", str(error.value))[1]).unlink()
    assert read_latest(tmp_path) is None


@pytest.mark.parametrize("change", ["renamed", "other file", "other size", "no files"])
def test_a_manifest_of_other_files_is_refused_though_its_digest_is_right(tmp_path, change):
    write(tmp_path, checkpoint(1))
    content, _ = digests.decode((tmp_path / "step-000001.json").read_bytes())
    (described,) = content["files"].values()
    if change == "renamed":
        for ending in ("json", "safetensors"):
            (tmp_path / f"step-000001.{ending}").rename(tmp_path / f"step-000009.{ending}")
        content["files"] = {"step-000009.safetensors": described}
    elif change == "other file":
        content["files"] = {"../secret.safetensors": described}
    elif change == "other size":
        described["size"] -= 1
    else:
        content["files"] = {}
    (commit,) = tmp_path.glob("*.json")
    commit.write_bytes(digests.encode(content)[0])
    with pytest.raises(ValueError, match="is damaged"):
        read_latest(tmp_path)


def test_a_file_of_another_size_is_not_read(tmp_path, monkeypatch):
    """A terabyte in place of a checkpoint costs no memory; neither does one for a manifest."""
    write(tmp_path, checkpoint(1))
    monkeypatch.setattr(os, "pread", lambda *_: pytest.fail("it was read"), raising=True)
    for ending in ("json", "safetensors"):
        file = tmp_path / f"step-000001.{ending}"
        content = file.read_bytes()
        os.truncate(file, 2**40)
        with monkeypatch.context() as patch:
            if ending == "safetensors":
                patch.setattr("dpengine.durable.read", read_but(file))
            with pytest.raises(ValueError, match=f"{file} is damaged"):
                read_latest(tmp_path)
        file.write_bytes(content)


def read_but(file):
    """``durable.read`` with real reads of every other file."""

    def read(path, at_most, read=durable.read):
        return read(path, at_most) if path == file else path.read_bytes()

    return read


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
