"""What make_private is given: refused with a way out, or taken; and modules that mix records."""

import copy
import dataclasses
import inspect
import itertools

import numpy as np
import opacus
import pytest
import torch
from torch import nn
from torch.optim import SGD, AdamW
from torch.utils.data import (
    BatchSampler,
    ConcatDataset,
    DataLoader,
    IterableDataset,
    RandomSampler,
    Sampler,
    SequentialSampler,
    Subset,
    SubsetRandomSampler,
    TensorDataset,
    WeightedRandomSampler,
)

from dpengine import Adaptive, Automatic, DPDataLoader, PerLayer, PrivacyEngine, PrivacyError
from dpengine.dropin.arguments import Arguments

N = 12


class Stream(IterableDataset):
    def __iter__(self):
        return iter(torch.ones(N, 3))


def new_module() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))


def given(module=None) -> dict:
    module = module or new_module()
    return {
        "module": module,
        "optimizer": AdamW([p for p in module.parameters() if p.requires_grad], lr=0.1),
        "data_loader": DataLoader(TensorDataset(torch.ones(N, 3)), batch_size=4),
        "noise_multiplier": 1.0,
        "max_grad_norm": 1.0,
    }


def as_it_is(module: nn.Module, optimizer: torch.optim.Optimizer) -> str:
    """What make_private may change of module and optimizer, as text."""
    of_module = [
        (name, sorted(vars(child)), list(child._forward_pre_hooks), list(child._forward_hooks))
        for name, child in module.named_modules()
    ]
    params = [(id(p), p.requires_grad, p.grad is None, p.tolist()) for p in module.parameters()]
    groups = [
        {**group, "params": [id(p) for p in group["params"]]} for group in optimizer.param_groups
    ]
    return repr((of_module, params, groups, sorted(vars(optimizer)), list(optimizer.state)))


BAD = [
    ({"noise_multiplier": -1.0}, "noise_multiplier must be"),
    ({"noise_multiplier": float("nan")}, "noise_multiplier must be"),
    ({"noise_multiplier": float("inf")}, "noise_multiplier must be"),
    ({"max_grad_norm": 0.0}, "max_grad_norm must be"),
    ({"max_grad_norm": float("inf")}, "max_grad_norm must be"),
    ({"max_grad_norm": [0.3, 0.4]}, r"give 0\.5, the root of the sum of squares"),
    ({"max_grad_norm": (3.0, 4.0, 12.0)}, "give 13, .* of the 3 bounds"),
    ({"max_grad_norm": None}, "must be one number, got a NoneType"),
    ({"batch_first": False}, "batch_first must be True"),
    ({"loss_reduction": "none"}, "loss_reduction must be 'mean' or 'sum'"),
    ({"clipping": "adaptive"}, r"give dpengine\.Adaptive\(max_grad_norm, count_noise_stddev\)"),
    ({"clipping": "per-layer"}, "clipping must be 'flat', 'per_layer'"),
    ({"clipping": 3}, "clipping must be Flat, PerLayer, Automatic or Adaptive"),
    ({"clipping": PerLayer(2.0)}, r"that of the clipping, 2\.0, got 1\.0"),
    ({"clipping": Adaptive(1.0, 0.4)}, "count_noise_stddev must be above half"),
    ({"noise_generator": torch.Generator()}, "generator must be None"),
    ({"grad_sample_mode": "ghost_fsdp"}, "grad_sample_mode must be one of"),
    ({"grad_sample_mode": "no_op"}, "grad_sample_mode must be one of"),
    ({"rand_on_empty": True}, "rand_on_empty must be False"),
    ({"draws_per_record": 0}, "draws_per_record must be a whole number"),
    ({"draws_per_record": 1.5}, "draws_per_record must be a whole number"),
    ({"sample_rate": 1.5}, "sample_rate must be above 0 and at most 1"),
    ({"sample_rate": -0.5}, "sample_rate must be above 0 and at most 1"),
    ({"sample_rate": 0.5, "poisson_sampling": False}, "go with Poisson sampling"),
    ({"unit_ids": np.arange(N), "poisson_sampling": False}, "go with Poisson sampling"),
    ({"rows_per_unit": 2}, "rows_per_unit must be 1 without unit_ids"),
    ({"static_batch": 0}, "static_batch must be a whole number"),
    ({"static_batch": 2.5}, "static_batch must be a whole number"),
    ({"loss_scale": 0.0}, "loss_scale must be"),
    ({"impl": "cuda"}, "impl must be one of"),
    ({"optimizer": None}, "optimizer must be a torch optimizer"),
    ({"optimizer": SGD(new_module().parameters())}, r"and no others.* dpengine\.Together"),
    ({"data_loader": DataLoader(Stream())}, "a dataset with numbered records"),
    ({"data_loader": DataLoader(TensorDataset(torch.ones(N, 3)), batch_size=None)}, "batch_size"),
    (
        {"data_loader": DataLoader(TensorDataset(torch.ones(3, 3)), batch_size=4)},
        "^batch_size must",
    ),
    ({"module": nn.ModuleList([nn.Linear(3, 2)])}, r"ModuleList cannot be: .* dpengine\.Together"),
    ({"module": nn.ModuleDict({"a": nn.Linear(3, 2)})}, "ModuleDict cannot be: make one of"),
    ({"alphas": [2.0]}, "does not take alphas: leave it out, epsilon is composed"),
    ({"epsilon_tolerance": 0.1}, "does not take epsilon_tolerance: leave it out"),
    ({"target_unclipped_quantile": 0.5}, r"clipping=dpengine\.Adaptive\(\.\.\.\), its quantile"),
    ({"max_clipbound": 1.0}, "max_clipbound: leave it out"),
    ({"min_clipbound": 1.0}, "min_clipbound: leave it out"),
    ({"clipbound_learning_rate": 1.0}, "its learning_rate"),
    ({"unclipped_num_std": 1.0}, "its count_noise_stddev"),
    ({"strict": False}, "every trainable tensor needs a per-record rule"),
    ({"force_functorch": True}, r"run through torch\.func"),
    ({"n_accumulation_steps": 2}, "does not take n_accumulation_steps; it takes module, optimizer"),
]


@pytest.mark.parametrize(("bad", "words"), BAD, ids=lambda value: str(value)[:40])
def test_a_bad_argument_is_named_and_changes_nothing(bad, words):
    how = given()
    before = as_it_is(how["module"], how["optimizer"])
    engine = PrivacyEngine()
    with pytest.raises((ValueError, TypeError), match=words):
        engine.make_private(**(how | bad))

    assert as_it_is(how["module"], how["optimizer"]) == before and len(engine.accountant) == 0
    module, optimizer, loader = engine.make_private(**how)
    module(next(iter(loader))[0]).mean().backward()
    optimizer.step()


UNSEEN = [
    ({"sample_rate": 0.0}, "sample_rate must be above 0"),
    ({"unit_ids": np.arange(N - 1)}, "one id for each record"),
    ({"unit_ids": np.arange(N).reshape(2, -1)}, "one id for each record"),
    ({"unit_ids": np.arange(N + 1)}, "one id for each record"),
    ({"module": None}, "module must be"),
    ({"data_loader": [torch.ones(4, 3)]}, "data_loader must be"),
    ({"noise_multiplier": "1"}, "noise_multiplier must be"),
    ({"noise_generator": torch.Generator()}, "^noise_generator must be"),
]


@pytest.mark.parametrize(("bad", "words"), UNSEEN, ids=lambda value: str(value)[:40])
def test_arguments_of_the_wrong_kind_are_named(bad, words):
    with pytest.raises((ValueError, TypeError), match=words):
        PrivacyEngine().make_private(**(given() | bad))


@pytest.mark.parametrize("bad", [{"max_grad_norm": -1.0}, {"loss_reduction": "none"}])
def test_a_bad_second_call_leaves_the_first_as_it_was(bad):
    how, engine = given(), PrivacyEngine()
    module, optimizer, loader = engine.make_private(**how)
    with pytest.raises(ValueError):
        engine.make_private(**(how | bad))
    module(next(iter(loader))[0]).mean().backward()
    optimizer.step()


def test_cleanup_leaves_the_module_as_it_was():
    how = given()
    before = as_it_is(how["module"], how["optimizer"])
    capture, _, _ = PrivacyEngine().make_private(**how, wrap_model=False)
    capture.cleanup()
    assert as_it_is(how["module"], how["optimizer"]) == before


def test_every_argument_of_opacus_is_taken_or_answered():
    ours = {field.name for field in dataclasses.fields(Arguments)}
    for name in ("make_private", "make_private_with_epsilon"):
        theirs = set(inspect.signature(getattr(opacus.PrivacyEngine, name)).parameters)
        own = set(inspect.signature(getattr(PrivacyEngine, name)).parameters)
        assert theirs - {"self", "kwargs"} <= ours | own
    for name in ("save_checkpoint", "load_checkpoint"):
        theirs = inspect.signature(getattr(opacus.PrivacyEngine, name)).parameters
        own = inspect.signature(getattr(PrivacyEngine, name)).parameters
        answered = {"torch_save_kwargs", "torch_load_kwargs"}
        answered |= {"noise_scheduler", "grad_clip_scheduler"}
        assert set(theirs) - set(own) <= answered
    defaults = inspect.signature(opacus.PrivacyEngine.make_private).parameters
    for field in dataclasses.fields(Arguments):
        if field.name in defaults and field.default is not dataclasses.MISSING:
            assert field.default == defaults[field.name].default, field.name


@pytest.mark.parametrize(
    ("clipping", "kind"),
    [
        ("flat", "Flat"),
        ("per_layer", "PerLayer"),
        ("automatic", "Automatic"),
        (Automatic(1.0), "Automatic"),
        (Adaptive(1.0, 5.0), "Adaptive"),
    ],
)
def test_ways_of_clipping_are_taken_by_name_or_as_they_are(clipping, kind):
    optimizer = PrivacyEngine().make_private(**given(), clipping=clipping)[1]
    assert type(optimizer.clipping).__name__ == kind and optimizer.max_grad_norm == 1.0


def test_a_loader_of_ours_is_taken_with_its_rate():
    loader = DPDataLoader(TensorDataset(torch.ones(N, 3)), sample_rate=0.1)
    _, optimizer, made = PrivacyEngine().make_private(**(given() | {"data_loader": loader}))
    assert made.sample_rate == 0.1 and optimizer.expected_batch_size == pytest.approx(1.2)
    with pytest.raises(ValueError, match="sample_rate must be left out with a DPDataLoader"):
        PrivacyEngine().make_private(**(given() | {"data_loader": loader}), sample_rate=0.2)
    with pytest.raises(ValueError, match="data_loader samples by itself"):
        PrivacyEngine().make_private(**(given() | {"data_loader": loader}), poisson_sampling=False)


def test_a_loader_of_people_goes_on_to_protect_people():
    ids = np.arange(N) // 3
    loader = DPDataLoader(TensorDataset(torch.ones(N, 3)), sample_rate=0.5, unit_ids=ids)
    try:
        made = PrivacyEngine().make_private(**(given() | {"data_loader": loader}))[2]
    except ValueError:
        return
    assert made.batch_sampler.rate.unit == "unit"


DATA = TensorDataset(torch.ones(N, 3))


class Order(Sampler):
    def __init__(self, indices) -> None:
        self.indices = indices

    def __iter__(self):
        return iter(self.indices)


class Batches(list):
    """Batches of indices, as a batch sampler of one's own gives them."""

    batch_size = 4


HELD_OUT = {
    "SubsetRandomSampler": {"sampler": SubsetRandomSampler(range(N - 2)), "batch_size": 4},
    "another sampler": {"sampler": Order(range(2, N)), "batch_size": 4},
    "a list": {"sampler": list(range(N - 1)), "batch_size": 4},
    "weights": {"sampler": WeightedRandomSampler([1.0] * 8 + [0.0] * 4, N), "batch_size": 4},
    "in order, of fewer": {"sampler": SequentialSampler(range(N - 1)), "batch_size": 4},
    "shuffled, of fewer": {"sampler": RandomSampler(range(N - 1)), "batch_size": 4},
    "as tensors": {"sampler": Order(torch.arange(N) % 6), "batch_size": 4},
    "twice": {"sampler": Order([*range(6), *range(6)]), "batch_size": 4},
    "without end": {"sampler": Order(itertools.cycle(range(N - 1))), "batch_size": 4},
    "BatchSampler": {"batch_sampler": BatchSampler(SubsetRandomSampler(range(8)), 4, False)},
    "batches": {"batch_sampler": Batches([[0, 1, 2, 3], [4, 5, 6, 7]])},
}
ALL = {
    "in order": {"batch_size": 4},
    "shuffled": {"batch_size": 4, "shuffle": True, "drop_last": True},
    "with replacement": {"sampler": RandomSampler(DATA, replacement=True), "batch_size": 4},
    "a few of all": {"sampler": RandomSampler(DATA, num_samples=4), "batch_size": 4},
    "an order of one's own": {"sampler": Order(range(N)[::-1]), "batch_size": 5},
    "as tensors": {"sampler": Order(torch.arange(N).flip(0)), "batch_size": 4},
    "batches": {"batch_sampler": Batches([[8, 9, 10, 11], [4, 5, 6, 7], [0, 1, 2, 3]])},
}


@pytest.mark.parametrize("how", HELD_OUT.values(), ids=HELD_OUT)
def test_records_that_a_sampler_holds_out_are_not_trained_on(how):
    loader = DataLoader(DATA, **how)
    for make in (
        lambda: PrivacyEngine().make_private(**(given() | {"data_loader": loader})),
        lambda: PrivacyEngine().make_private(
            **(given() | {"data_loader": loader}), sample_rate=0.5
        ),
        lambda: DPDataLoader.from_data_loader(loader),
        lambda: DPDataLoader.from_data_loader(loader, sample_rate=0.5),
    ):
        with pytest.raises(ValueError, match=r"leaves records out.*Subset\(dataset, indices\)"):
            make()


@pytest.mark.parametrize("how", ALL.values(), ids=ALL)
def test_an_order_of_all_records_may_be_given_up(how):
    loader = DataLoader(DATA, **how)
    assert DPDataLoader.from_data_loader(loader).sample_rate
    made = PrivacyEngine().make_private(**(given() | {"data_loader": loader}), sample_rate=1.0)[2]
    assert sum(len(x) for (x,) in itertools.islice(made, 1)) == N


def test_held_out_records_stay_so_in_an_own_order_and_in_a_subset():
    loader = DataLoader(DATA, sampler=SubsetRandomSampler(range(5)), batch_size=5)
    how = given() | {"data_loader": loader, "poisson_sampling": False}
    made = PrivacyEngine().make_private(**how)[2]
    assert [len(x) for (x,) in made] == [5]
    with pytest.raises(ValueError, match="leaves records out"):
        PrivacyEngine().make_private(**(how | {"data_loader": made, "poisson_sampling": True}))
    subset = DataLoader(Subset(DATA, range(5)), batch_size=5)
    made = PrivacyEngine().make_private(**(given() | {"data_loader": subset}))[2]
    assert len(next(iter(made))[0]) == 5


class Mixer(nn.Module):
    """Takes rows in a dict beside other things; ``mix`` is what it does with its hidden rows."""

    def __init__(self, mix, reduce=False) -> None:
        super().__init__()
        self.first, self.mix, self.last = nn.Linear(3, 4), mix, nn.Linear(4, 2)
        self.reduce = reduce
        self.register_buffer("seen", torch.zeros(1))

    def forward(self, x, *, more=None, scale=1.0):
        hidden = self.first(x) if more is None else self.first(x) + self.first(more["rows"]["a"])
        out = self.last(self.mix(hidden) * scale)
        return out.square().sum(1).mean() if self.reduce else out


class BatchMean(nn.Module):
    def forward(self, hidden):
        return hidden - hidden.mean(0)


class AcrossBatch(nn.Module):
    def forward(self, hidden):
        return torch.softmax(hidden @ hidden.t(), 1) @ hidden


class WithinRecord(nn.Module):
    """What the K rows of one record may do with each other."""

    def forward(self, hidden):
        pairs = hidden.view(-1, 2, 4)
        return (pairs - 0.5 * pairs.mean(1, keepdim=True)).flatten(0, 1)


def called(module, x, how: str) -> torch.Tensor:
    if how == "positional":
        return module(x)
    return module(x=x, more={"rows": {"a": x + 1}, "n": 3}, scale=torch.tensor(0.5))


def first_batch(mix, draws, *, reduce=False):
    module = Mixer(mix, reduce)
    how = given(module) | {"sample_rate": 1.0, "draws_per_record": draws}
    x = torch.randn(N, 3, generator=torch.Generator().manual_seed(0))
    how["data_loader"] = DataLoader(TensorDataset(x), batch_size=4)
    module, optimizer, loader = PrivacyEngine().make_private(**how)
    return module, optimizer, next(iter(loader))[0].repeat_interleave(draws, 0)


@pytest.mark.parametrize("how", ["positional", "keywords"])
@pytest.mark.parametrize("draws", [1, 2])
@pytest.mark.parametrize("mix", [BatchMean, AcrossBatch])
def test_a_module_that_mixes_records_is_named_before_its_first_step(mix, draws, how):
    module, optimizer, x = first_batch(mix(), draws)
    before = copy.deepcopy(module.state_dict())
    with pytest.raises(PrivacyError, match=f"module 'mix', a {mix.__name__}, mixes the records"):
        called(module, x, how)
    with pytest.raises(PrivacyError):
        optimizer.step()
    assert all(torch.equal(module.state_dict()[name], t) for name, t in before.items())


def test_a_module_that_mixes_records_stays_refused():
    module, optimizer, x = first_batch(BatchMean(), 1)
    for _ in range(3):
        with pytest.raises(PrivacyError, match="mixes the records"):
            module(x).square().mean().backward()
            optimizer.step()


def test_a_second_module_of_one_engine_and_one_made_private_again_are_looked_at():
    engine, sound, mixing = PrivacyEngine(), Mixer(nn.Identity()), Mixer(BatchMean())
    x = torch.randn(N, 3, generator=torch.Generator().manual_seed(0))

    def use(module) -> None:
        loader = engine.make_private(**given(module), sample_rate=1.0)[2]
        next(iter(loader))
        module(x)

    use(sound)
    sound.mix = BatchMean()
    for module in (mixing, mixing, sound):
        with pytest.raises(PrivacyError, match="module 'mix', a BatchMean, mixes the records"):
            use(module)


def test_a_module_that_mixes_records_and_gives_its_own_loss_is_named():
    module, _, x = first_batch(BatchMean(), 1, reduce=True)
    with pytest.raises(PrivacyError, match="module 'mix', a BatchMean, mixes the records"):
        module(x)


@pytest.mark.parametrize("how", ["positional", "keywords"])
@pytest.mark.parametrize(("mix", "draws"), [(nn.Tanh(), 1), (nn.Tanh(), 2), (WithinRecord(), 2)])
def test_a_module_that_keeps_them_apart_is_left_as_it_is(mix, draws, how):
    module, optimizer, x = first_batch(mix, draws)
    before, random = copy.deepcopy(module.state_dict()), torch.get_rng_state()
    expected = called(copy.deepcopy(module).eval(), x, how)
    versions = [p._version for p in (*module.parameters(), *module.buffers())]
    out = called(module, x, how)

    torch.testing.assert_close(out, expected)
    assert torch.equal(torch.get_rng_state(), random)
    assert versions == [p._version for p in (*module.parameters(), *module.buffers())]
    assert all(torch.equal(module.state_dict()[name], t) for name, t in before.items())
    assert all(p.grad is None for p in module.parameters())
    out.square().mean().backward()
    optimizer.step()
    assert not torch.equal(module.last.weight, before["last.weight"])


@pytest.mark.parametrize(
    "layer", [nn.BatchNorm1d(4), nn.BatchNorm1d(4, track_running_stats=False, affine=False)]
)
def test_a_normalisation_over_the_batch_is_refused_by_name(layer):
    how = given(Mixer(layer))
    before = as_it_is(how["module"], how["optimizer"])
    with pytest.raises(ValueError, match="module 'mix' is a BatchNorm1d, which mixes"):
        PrivacyEngine().make_private(**how)
    assert as_it_is(how["module"], how["optimizer"]) == before


@pytest.mark.parametrize(
    "repeat",
    [
        lambda data: ConcatDataset([data] * 3),
        lambda data: Subset(data, [0, 1, 2, 1]),
        lambda data: Subset(Subset(data, [3, 3, 4]), [0, 1]),
    ],
    ids=["three times", "an index twice", "within"],
)
def test_a_record_under_several_numbers_is_refused_unless_it_is_named(repeat):
    data = repeat(TensorDataset(torch.randn(12, 4)))
    module = nn.Linear(4, 2).train()
    how = dict(
        module=module,
        optimizer=torch.optim.SGD(module.parameters(), lr=0.1),
        data_loader=DataLoader(data, batch_size=1),
        noise_multiplier=1.0,
        max_grad_norm=1.0,
    )
    with pytest.raises(ValueError, match=r"under several numbers.*unit_ids"):
        PrivacyEngine().make_private(**how)
    with pytest.raises(ValueError, match=r"under several numbers.*unit_ids"):
        PrivacyEngine().make_private(**how, unit_ids=np.arange(len(data)))
    PrivacyEngine().make_private(**how, unit_ids=np.arange(len(data)) // len(data))
