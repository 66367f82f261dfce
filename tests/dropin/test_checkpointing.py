"""Checkpoints of a user's own loop: all of it comes back, nothing else does."""

import ast
import copy
import io
import json
import os
import random
import struct
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import nn
from torch.optim import SGD, AdamW
from torch.utils._pytree import tree_map
from torch.utils.data import DataLoader, TensorDataset

import dpengine.dropin
from dpengine import Adaptive, PrivacyEngine
from dpengine.optim.update import LowPass

DELTA = 1e-3

OWN = {"module_state_dict", "privacy_accountant_state_dict"}
"""What comes back beside what the caller added, under Opacus' names."""


class Tied(nn.Module):
    """Two layers of one weight, as in language models, and a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(3, 3), nn.Linear(3, 3, bias=False)
        self.second.weight = self.first.weight
        self.second.requires_grad_(False)
        self.out = nn.Linear(3, 2)
        self.register_buffer("scale", torch.full((2,), 0.5))

    def forward(self, x):
        return self.out(self.second(x)) * self.scale


def private(*, seed=0, inner=AdamW, sigma=1.0, engine=None, module=None, **changed):
    torch.manual_seed(seed)
    engine = engine or PrivacyEngine()
    module = module or nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    module, optimizer, loader = engine.make_private(
        module=module,
        optimizer=inner([p for p in module.parameters() if p.requires_grad], lr=0.01),
        data_loader=DataLoader(TensorDataset(torch.randn(12, 3)), batch_size=4),
        noise_multiplier=sigma,
        max_grad_norm=1.0,
        **changed,
    )
    return engine, module, optimizer, loader


def train(module, optimizer, loader, n_passes=1) -> None:
    for _ in range(n_passes):
        for (x,) in loader:
            module(x).square().sum(1).mean().backward()
            optimizer.step()
            optimizer.zero_grad()


def everything(engine, module, optimizer=None) -> str:
    """All that a checkpoint may change, as text."""
    state = [module.state_dict(), engine.accountant.state_dict()]
    if optimizer is not None:
        settings = [optimizer.max_grad_norm, optimizer.noise_multiplier]
        state += [optimizer.state_dict(), optimizer.filter.state_dict(), settings]
    return repr(tree_map(lambda leaf: leaf.tolist() if torch.is_tensor(leaf) else leaf, state))


def saved(path, n_passes=2, **changed):
    made = private(**changed)
    train(*made[1:], n_passes=n_passes)
    engine, module, optimizer, _ = made
    engine.save_checkpoint(path=path, module=module, optimizer=optimizer)
    return engine, module, optimizer


@pytest.fixture
def path(tmp_path) -> Path:
    return tmp_path / "checkpoint.safetensors"


@pytest.mark.parametrize("inner", [SGD, AdamW])
def test_weights_optimizer_and_charges_come_back(path, inner):
    engine, module, optimizer = saved(path, inner=inner)
    optimizer.param_groups[0]["lr"] = 0.007
    engine.save_checkpoint(path=str(path), module=module, optimizer=optimizer)
    again, other, fresh, loader = private(seed=1, inner=inner)
    assert everything(again, other, fresh) != everything(engine, module, optimizer)
    loaded = again.load_checkpoint(path=path, module=other, optimizer=fresh)
    assert loaded.keys() == OWN and loaded["module_state_dict"].keys() == other.state_dict().keys()

    assert fresh.param_groups[0]["lr"] == 0.007
    assert other.state_dict().keys() == module.state_dict().keys()
    for name, tensor in module.state_dict().items():
        assert torch.equal(other.state_dict()[name], tensor)
    ours, theirs = (o.state_dict()["state"] for o in (optimizer, fresh))
    assert ours.keys() == theirs.keys() and (inner is SGD or len(ours) == 4)
    for index, state in ours.items():
        for name, value in state.items():
            assert torch.equal(torch.as_tensor(theirs[index][name]), torch.as_tensor(value))
    assert again.accountant.history == engine.accountant.history == [(1.0, 1 / 3, 6)]
    assert again.get_epsilon(DELTA) == engine.get_epsilon(DELTA)
    train(other, fresh, loader)
    assert len(again.accountant) == 9 and len(engine.accountant) == 6


def test_training_goes_on_as_if_it_had_not_stopped(path):
    """With noise 0 and every record in every batch the weights are those of one long run."""
    rate = {"sigma": 0.0, "sample_rate": 1.0}
    engine, module, optimizer, loader = private(**rate)
    train(module, optimizer, loader, 3)
    engine.save_checkpoint(path=path, module=module, optimizer=optimizer)
    again, other, fresh, own = private(seed=1, **rate)
    own.dataset.tensors[0].copy_(loader.dataset.tensors[0])
    again.load_checkpoint(path=path, module=other, optimizer=fresh)
    train(module, optimizer, loader, 3)
    train(other, fresh, own, 3)

    for a, b in zip(module.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)


def test_the_bound_of_adaptive_clipping_and_the_filter_come_back(path):
    mode = Adaptive(1.0, 5.0, quantile=0.9)
    engine, module, optimizer, loader = private(clipping=mode)
    optimizer.filter = LowPass(0.9)
    train(module, optimizer, loader, 3)
    engine.save_checkpoint(path=path, module=module, optimizer=optimizer)
    again, other, fresh, _ = private(seed=1, clipping=mode)
    fresh.filter = LowPass(0.9)
    again.load_checkpoint(path=path, module=other, optimizer=fresh)

    assert fresh.max_grad_norm == optimizer.max_grad_norm != 1.0
    ours, theirs = optimizer.filter.state_dict(), fresh.filter.state_dict()
    assert ours.keys() == theirs.keys() and ours
    for name, value in ours.items():
        assert torch.equal(torch.as_tensor(theirs[name]), torch.as_tensor(value))


def test_a_bound_that_was_given_stays_the_given_one(path):
    saved(path)
    again, other, fresh, _ = private()
    fresh.max_grad_norm = 0.25
    again.load_checkpoint(path=path, module=other, optimizer=fresh)
    assert fresh.max_grad_norm == 0.25


def test_what_the_caller_adds_comes_back(path):
    engine, module, _, _ = private()
    extra = {
        "epoch": 3,
        "ema": torch.arange(6.0).view(2, 3).t(),
        "half": torch.ones(2, dtype=torch.bfloat16),
        "none": torch.empty(0, 3),
        "scheduler": {"last_lr": [0.1, 2e-5], "name": "é", "done": None, "flag": True},
    }
    engine.save_checkpoint(path=path, module=module, checkpoint_dict=copy.deepcopy(extra))
    loaded = engine.load_checkpoint(path=path, module=module)

    assert loaded.keys() == extra.keys() | OWN
    assert loaded["privacy_accountant_state_dict"] == engine.accountant.state_dict()
    engine.save_checkpoint(path=path, module=module, checkpoint_dict=loaded)
    assert engine.load_checkpoint(path=path, module=module).keys() == loaded.keys()
    for name, value in extra.items():
        same = torch.equal if isinstance(value, torch.Tensor) else (lambda a, b: a == b)
        assert same(loaded[name], value) and type(loaded[name]) is type(value)
    assert loaded["half"].dtype == torch.bfloat16


def test_tied_weights_buffers_and_views_come_back(path):
    engine, module, optimizer, _ = private(module=Tied())
    whole = torch.arange(8.0)
    engine.save_checkpoint(
        path=path,
        module=module,
        optimizer=optimizer,
        checkpoint_dict={"even": whole[::2], "all": whole, "tail": whole[6:]},
    )
    again, other, fresh, _ = private(seed=1, module=Tied())
    other.scale.zero_()
    loaded = again.load_checkpoint(path=path, module=other, optimizer=fresh)

    assert loaded["even"].tolist() == [0, 2, 4, 6] and loaded["tail"].tolist() == [6, 7]
    assert torch.equal(loaded["all"], whole)
    assert other.second.weight is other.first.weight and other.scale.tolist() == [0.5, 0.5]
    assert torch.equal(other.first.weight, module.first.weight)


def test_a_file_is_tensors_and_json_and_holds_no_random_state(path):
    engine, module, optimizer, loader = private(inner=SGD)
    x = next(iter(loader))[0]
    module(x).square().sum().backward()  # a batch under way
    engine.save_checkpoint(path=path, module=module, optimizer=optimizer)

    with safe_open(path, framework="pt") as file:
        names = set(file.keys())
        rest = json.loads(file.metadata()["dpengine"])["state"]
    assert names == {f"module.{name}" for name in module.state_dict()}
    kind, items = rest
    assert kind == "dict"
    assert {name for name, _ in items} == {"module", "optimizer", "accountant", "extra"}
    of_optimizer = dict(items)["optimizer"]
    assert {name for name, _ in of_optimizer[1]} == {"state_dict", "filter", "max_grad_norm"}
    (size,) = struct.unpack("<Q", path.read_bytes()[:8])
    json.loads(path.read_bytes()[8 : 8 + size])
    n_bytes = sum(t.nbytes for t in module.state_dict().values())
    assert path.stat().st_size == 8 + size + n_bytes


def test_the_room_knows_no_pickle():
    banned = {"pickle", "dill", "cloudpickle", "joblib", "marshal", "shelve"}
    files = sorted(Path(dpengine.dropin.__file__).parent.glob("*.py"))
    of_runs = Path(dpengine.__file__).parent / "run"
    files += [of_runs / "checkpoint.py", of_runs / "state_file.py"]
    assert len(files) >= 7
    for file in files:
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Import | ast.ImportFrom):
                names = [alias.name for alias in node.names] + [getattr(node, "module", "") or ""]
                assert not {part for name in names for part in name.split(".")} & banned, file
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                assert (node.value.id, node.attr) not in {("torch", "load"), ("torch", "save")}


def damaged(content: bytes, chance: random.Random) -> bytes:
    """Cut, or a few bytes others than they were."""
    if chance.random() < 0.25:
        return content[: chance.randrange(len(content))]
    changed = bytearray(content)
    for _ in range(chance.choice((1, 1, 3))):
        changed[chance.randrange(len(changed))] ^= 1 << chance.randrange(8)
    return bytes(changed)


def test_a_cut_file_is_refused(path):
    saved(path)
    content = path.read_bytes()
    again, other, fresh, _ = private(seed=1)
    before = everything(again, other, fresh)
    for size in sorted({0, 1, 7, 8, 9, len(content) - 1, *range(0, len(content), 97)}):
        path.write_bytes(content[:size])
        with pytest.raises(ValueError, match="damaged"):
            again.load_checkpoint(path=path, module=other, optimizer=fresh)
    path.write_bytes(content + b"0")
    with pytest.raises(ValueError, match="damaged"):
        again.load_checkpoint(path=path, module=other, optimizer=fresh)
    assert everything(again, other, fresh) == before


@pytest.mark.parametrize("part", ["header", "tensors"])
def test_a_damaged_file_is_refused_and_changes_nothing(path, part):
    saved(path)
    chance, content = random.Random(0), path.read_bytes()
    (size,) = struct.unpack("<Q", content[:8])
    first, last = (0, 8 + size) if part == "header" else (8 + size, len(content))
    again, other, fresh, _ = private(seed=1)
    before = everything(again, other, fresh)
    for _ in range(100):
        path.write_bytes(content[:first] + damaged(content[first:last], chance) + content[last:])
        with pytest.raises(ValueError, match="damaged"):
            again.load_checkpoint(path=path, module=other, optimizer=fresh)
        assert everything(again, other, fresh) == before


def test_a_file_of_another_kind_is_refused_and_not_unpickled(path):
    engine, module, _, _ = private()
    torch.save({"module": module.state_dict()}, path)
    for content in (b"", b"\x80\x04K\x01.", b"{}", path.read_bytes()):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"checkpoint\.safetensors is damaged, or was not wr"):
            engine.load_checkpoint(path=path, module=module)


def test_a_missing_file_is_named(path):
    engine, module, _, _ = private()
    with pytest.raises((FileNotFoundError, ValueError), match="checkpoint"):
        engine.load_checkpoint(path=path, module=module)
    with pytest.raises(TypeError, match="path must name a file"):
        engine.save_checkpoint(path=3, module=module)


@pytest.mark.parametrize("failing", ["replace", "fsync"])
def test_a_write_that_fails_leaves_the_old_file(path, failing, monkeypatch):
    engine, module, optimizer = saved(path)
    content = path.read_bytes()
    module[0].weight.data += 1

    def fail(*arguments):
        raise OSError("no space left")

    monkeypatch.setattr(os, failing, fail)
    with pytest.raises(OSError, match="no space"):
        engine.save_checkpoint(path=path, module=module, optimizer=optimizer)
    assert path.read_bytes() == content and list(path.parent.iterdir()) == [path]


def test_what_json_does_not_know_is_refused_before_the_file_is_touched(path):
    engine, module, _ = saved(path)
    content = path.read_bytes()
    for extra in ({"model": module}, {"set": {1}}, {"nested": [{"of": module}]}):
        with pytest.raises(TypeError, match="and no objects, got a"):
            engine.save_checkpoint(path=path, module=module, checkpoint_dict=extra)
    assert path.read_bytes() == content


def test_an_optimizer_is_saved_and_loaded_or_neither(path):
    engine, module, _ = saved(path)
    again, other, fresh, _ = private(seed=1)
    before = everything(again, other, fresh)
    with pytest.raises(ValueError, match="saved with an optimizer"):
        again.load_checkpoint(path=path, module=other)
    engine.save_checkpoint(path=path, module=module)
    with pytest.raises(ValueError, match="saved without an optimizer"):
        again.load_checkpoint(path=path, module=other, optimizer=fresh)
    assert everything(again, other, fresh) == before


@pytest.mark.parametrize("last", [nn.Linear(4, 3), nn.Linear(4, 2, bias=False)])
def test_a_checkpoint_of_another_model_changes_nothing(path, last):
    saved(path)
    shape = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), copy.deepcopy(last))
    again, other, fresh, _ = private(seed=1, module=shape)
    before = everything(again, other, fresh)
    with pytest.raises((ValueError, RuntimeError)):
        again.load_checkpoint(path=path, module=other, optimizer=fresh)
    assert everything(again, other, fresh) == before


@pytest.mark.parametrize("kind", ["filter", "groups"])
def test_a_checkpoint_of_another_optimizer_changes_nothing(path, kind):
    saved(path)
    again, other, fresh, _ = private(seed=1)
    if kind == "filter":
        fresh.filter = LowPass(0.9)
    else:
        fresh.add_param_group({"params": [nn.Parameter(torch.ones(1), requires_grad=False)]})
    before = everything(again, other, fresh)
    with pytest.raises(ValueError):
        again.load_checkpoint(path=path, module=other, optimizer=fresh)
    assert everything(again, other, fresh) == before


def test_loading_lowers_no_count(path):
    engine, module, _ = saved(path)
    made = private(engine=engine, module=module, seed=2)
    train(*made[1:])
    spent = engine.accountant.state_dict()
    for _ in range(2):
        engine.load_checkpoint(path=path, module=module, optimizer=made[2])
        assert len(engine.accountant) == 9 and engine.accountant.state_dict() == spent


def test_two_that_go_on_from_one_file_add_up(path):
    saved(path)
    files = []
    for number in (1, 2):
        engine, module, optimizer, loader = private(seed=number)
        engine.load_checkpoint(path=path, module=module, optimizer=optimizer)
        train(module, optimizer, loader, number)
        files.append(path.with_name(str(number)))
        engine.save_checkpoint(path=files[-1], module=module, optimizer=optimizer)
    merged, module, optimizer, _ = private(seed=3)
    for file in (*files, path, *files):
        merged.load_checkpoint(path=file, module=module, optimizer=optimizer)

    assert len(merged.accountant) == 6 + 3 + 6


@pytest.mark.parametrize("name", ["torch_save_kwargs", "noise_scheduler", "grad_clip_scheduler"])
def test_arguments_of_opacus_say_what_to_use(path, name):
    engine, module, _, _ = private()
    engine.save_checkpoint(path=path, module=module, **{name: None})
    for call in (engine.save_checkpoint, engine.load_checkpoint):
        with pytest.raises(TypeError, match=f"{name} is not taken: (leave it out|put its state)"):
            call(path=path, module=module, **{name: {}})
        with pytest.raises(TypeError, match="unexpected argument 'foo'"):
            call(path=path, module=module, foo=None)


def test_arguments_of_the_state_dict_are_handed_on(path):
    engine, module, _, _ = private()
    engine.save_checkpoint(path=path, module=module, module_state_dict_kwargs={"prefix": "a."})
    with pytest.raises((RuntimeError, ValueError), match="bias"):
        engine.load_checkpoint(path=path, module=module)
    engine.load_checkpoint(path=path, module=module, module_load_dict_kwargs={"strict": False})


def test_what_a_state_dict_holds_comes_back_as_it_was(path):
    """Numbers as keys, as of a scheduler's milestones, tuples, and tensors inside."""
    engine, module, _ = saved(path)
    extra = {
        "milestones": {2: 1, 4: 2},
        "average": {"shadow": [torch.arange(3.0), torch.ones(1)], "decay": 0.5},
        "size": (3, (None, True)),
        "nothing": {},
        "text": "tensor",
    }
    engine.save_checkpoint(path=path, module=module, checkpoint_dict=extra)
    back = engine.load_checkpoint(path=path, module=module)
    shadow = extra["average"].pop("shadow")
    for a, b in zip(shadow, back["average"].pop("shadow"), strict=True):
        assert torch.equal(a, b)
    assert {name: value for name, value in back.items() if name not in OWN} == extra


def test_a_checkpoint_goes_into_an_open_file_and_comes_back():
    engine, module, optimizer, loader = private()
    train(module, optimizer, loader)
    file = io.BytesIO()
    engine.save_checkpoint(
        path=file, module=module, optimizer=optimizer, checkpoint_dict={"epoch": 3}
    )
    file.seek(0)
    other, twin, twin_optimizer, _ = private(seed=1)
    extra = other.load_checkpoint(path=file, module=twin, optimizer=twin_optimizer)
    assert extra.keys() == {"epoch"} | OWN and extra["epoch"] == 3
    for name, tensor in module.state_dict().items():
        assert torch.equal(tensor, twin.state_dict()[name])
    assert len(other.accountant) == len(engine.accountant)


def test_an_open_file_that_is_damaged_is_refused():
    engine, module, _, _ = private()
    file = io.BytesIO()
    engine.save_checkpoint(path=file, module=module)
    for content in (file.getvalue()[:-3], b"", b"x" * 100):
        with pytest.raises(ValueError, match="damaged"):
            engine.load_checkpoint(path=io.BytesIO(content), module=module)


def test_the_names_of_opacus_wrapper_are_left_out(tmp_path):
    engine, module, _, _ = private()
    wrapped = nn.Module()
    wrapped._module = module
    engine.save_checkpoint(path=tmp_path / "c", module=wrapped)
    other, twin, _, _ = private(seed=1)
    other.load_checkpoint(path=tmp_path / "c", module=twin)
    for name, tensor in module.state_dict().items():
        assert torch.equal(tensor, twin.state_dict()[name])
