"""DPDataLoader: who is in a batch and how often, and in which shape a batch comes."""

from contextlib import nullcontext

import numpy as np
import pytest
import torch
from opacus.data_loader import DPDataLoader as Theirs
from scipy.stats import binom
from torch import nn
from torch.optim import SGD, AdamW
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset, default_collate
from transformers import BatchEncoding

from dpengine import BatchMemoryManager, DPDataLoader, PrivacyEngine, PrivacyError
from dpengine.dropin import loader as loaders

FALSE_ALARM = 1e-6
"""The probability with which a sound sampler fails one of the statistical tests."""

NEVER = 1e-12
"""A rate at which a batch has no record, but for one time in 10^10."""


class Numbers(Dataset):
    """Record i is the number i."""

    def __init__(self, n: int) -> None:
        self.n = n

    def __len__(self) -> int:
        return self.n

    def __getitem__(self, index: int) -> int:
        return index


class Mixed(Dataset):
    """Records of every kind that a collate function may see; none of its numbers is zero."""

    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> dict:
        return {
            "image": torch.full((1, 2, 2), index + 1.0),
            "pair": (index + 1, float(index + 1)),
            "array": np.full(3, index + 1, np.float32),
            "text": f"secret {index + 1}",
            "flag": True,
        }


def within(counts: np.ndarray, n: int, p: float) -> bool:
    """Whether each count is a likely Binomial(n, p): all of them at once but for FALSE_ALARM."""
    share = FALSE_ALARM / counts.size / 2
    low, high = binom.ppf(share, n, p) - 1, binom.isf(share, n, p) + 1
    return bool(((counts >= low) & (counts <= high)).all())


def private(data, *, batch_size=4, inner=SGD, module=None, workers=0, **changed):
    torch.manual_seed(0)
    module = nn.Linear(3, 2) if module is None else module
    settings = {"noise_multiplier": 0.0, "max_grad_norm": 1.0}
    return PrivacyEngine().make_private(
        module=module,
        optimizer=inner((p for p in module.parameters() if p.requires_grad), lr=0.1),
        data_loader=DataLoader(data, batch_size=batch_size, num_workers=workers),
        **(settings | changed),
    )


def weights(module: nn.Module) -> torch.Tensor:
    return torch.cat([p.detach().flatten().clone() for p in module.parameters()])


@pytest.mark.parametrize("workers", [0, 2])
def test_each_record_enters_each_batch_with_its_own_coin(workers):
    n, rate, n_passes = 60, 0.05, 20
    loader = DPDataLoader(
        Numbers(n), sample_rate=rate, num_workers=workers, persistent_workers=workers > 0
    )
    batches = [batch.numpy() for _ in range(n_passes) for batch in loader]

    assert len(batches) == n_passes * 20
    entered = np.stack([np.isin(np.arange(n), batch) for batch in batches])
    assert [len(batch) for batch in batches] == entered.sum(1).tolist()  # nobody twice
    assert within(entered.sum(0), len(batches), rate)
    together = (entered & np.roll(entered, 1, axis=1)).sum(0)
    assert within(together, len(batches), rate**2)
    in_a_row = (entered[1:] & entered[:-1]).sum(0)
    assert within(in_a_row[::2], len(batches) - 1, rate**2)
    sizes = entered.sum(1)
    assert within(sizes, n, rate)
    # A sampler of batches of one size, or one nearly, would have its size too often.
    often = np.array([(sizes == size).sum() for size in range(n + 1)])
    likely = binom.isf(FALSE_ALARM / (n + 1), len(batches), binom.pmf(np.arange(n + 1), n, rate))
    assert (often <= likely + 1).all()


def test_a_seed_does_not_repeat_the_coins():
    loader, drawn = DPDataLoader(Numbers(64), sample_rate=0.5), []
    for _ in range(2):
        torch.manual_seed(0)
        np.random.seed(0)
        drawn.append([batch.tolist() for batch in loader])

    assert drawn[0] != drawn[1]  # equal with probability 2^-128


def test_a_person_enters_as_often_whatever_the_number_of_records():
    sizes = np.array([1, 2, 10] * 10)
    ids = np.random.default_rng(0).permutation(np.repeat(np.arange(30), sizes))
    rate, rows, n_passes = 0.1, 3, 40
    loader = DPDataLoader(
        Numbers(len(ids)), sample_rate=rate, unit_ids=ids, rows_per_unit=rows, batch_first=True
    )
    entered = np.zeros(30, int)
    for _ in range(n_passes):
        for batch in loader:
            units = ids[batch.numpy()].reshape(-1, rows)
            assert (units == units[:, :1]).all()  # a person's rows side by side
            assert len(np.unique(units[:, 0])) == len(units)
            entered[units[:, 0]] += 1

    assert within(entered, n_passes * len(loader), rate)


@pytest.mark.parametrize("managed", [False, True])
@pytest.mark.parametrize("static", [None, 2])
def test_a_person_is_never_cut(managed, static):
    ids = np.repeat(np.arange(9), 4)
    module, optimizer, loader = private(
        TensorDataset(torch.arange(36)),
        module=nn.Embedding(36, 2),
        batch_size=8,
        unit_ids=ids,
        rows_per_unit=3,
        static_batch=static,
        sample_rate=1.0,
    )
    most = 9 if not managed and static is None else 2
    if managed:
        loader = BatchMemoryManager(
            data_loader=loader, max_physical_batch_size=8, optimizer=optimizer
        ).__enter__()
    people = []
    for (rows,) in loader:
        whose = ids[rows.numpy()].reshape(-1, 3)
        assert len(rows) <= most * 3 and (whose == whose[:, :1]).all()
        people += whose[:, 0].tolist()
        module(rows).sum().backward()
        optimizer.step()
        optimizer.zero_grad()

    assert people[:9] == list(range(9))


@pytest.mark.parametrize(
    ("rate", "steps"), [(1.0, 1), (0.5, 2), (0.3, 4), (0.01, 100), (1e-3, 1000)]
)
def test_a_pass_expects_each_record_once_at_least(rate, steps):
    loader = DPDataLoader(Numbers(3), sample_rate=rate)

    assert len(loader) == steps
    assert sum(1 for _ in loader) == steps


def test_rate_comes_from_the_numbers_of_records_and_not_of_batches():
    loader = DataLoader(TensorDataset(torch.ones(100, 3)), batch_size=64)

    assert Theirs.from_data_loader(loader).sample_rate == 0.5
    assert DPDataLoader.from_data_loader(loader).sample_rate == 0.64
    assert private(loader.dataset, batch_size=64)[2].sample_rate == 0.64


def test_settings_of_the_loader_are_kept():
    def join(records):
        return torch.tensor(records) * 10

    given = DataLoader(
        Numbers(4), batch_size=2, num_workers=1, prefetch_factor=3, timeout=7, collate_fn=join
    )
    for loader in (given, DPDataLoader.from_data_loader(given)):
        made = DPDataLoader.from_data_loader(loader, sample_rate=1.0)
        assert (made.num_workers, made.prefetch_factor, made.timeout) == (1, 3, 7)
        assert [batch.tolist() for batch in made] == [[0, 10, 20, 30]]


def test_an_empty_batch_has_no_rows_where_no_model_is_bound():
    (batch,) = [next(iter(DPDataLoader(Mixed(), sample_rate=NEVER)))]

    full = default_collate([Mixed()[0]])
    for name in ("image", "array", "flag"):
        assert batch[name].shape == (0, *full[name].shape[1:])
        assert batch[name].dtype == full[name].dtype
    assert [len(leaf) for leaf in batch["pair"]] == [0, 0]


def test_an_empty_batch_has_no_texts_where_no_model_is_bound():
    assert next(iter(DPDataLoader(Mixed(), sample_rate=NEVER)))["text"] == []


@pytest.mark.parametrize("inner", [SGD, AdamW])
@pytest.mark.parametrize("draws", [1, 2])
def test_an_empty_batch_is_a_row_of_zeros_whose_gradient_is_dropped(inner, draws):
    def without_decay(params, lr):
        return inner(params, lr=lr, weight_decay=0.0)

    data = TensorDataset(torch.ones(9, 3), torch.ones(9, dtype=torch.long))
    capture, optimizer, loader = private(
        data, inner=without_decay, sample_rate=NEVER, draws_per_record=draws, wrap_model=False
    )
    told, announce = [], capture.announcements.announce
    capture.announcements.announce = lambda notice, *more: (
        told.append(notice),
        announce(notice, *more),
    )
    before = weights(capture.module)
    x, y = next(iter(loader))

    assert (x.tolist(), y.tolist(), y.dtype) == ([[0.0] * 3], [0], torch.long)
    assert (told[0].n_records.reveal(), told[0].n_slots, told[0].is_last) == (0, 1, True)
    out = capture.module(x.repeat_interleave(draws, 0))
    (out + 1).square().sum().backward()  # its gradient at zeros is not zero
    optimizer.step()
    assert torch.equal(weights(capture.module), before)


def test_an_empty_batch_gets_its_noise():
    module, optimizer, loader = private(
        TensorDataset(torch.ones(9, 3)), sample_rate=NEVER, noise_multiplier=1.0
    )
    before = weights(module)
    module(next(iter(loader))[0]).mean().backward()
    optimizer.step()

    assert (weights(module) != before).all()


def test_an_empty_batch_of_people_has_the_rows_of_one():
    loader = private(
        TensorDataset(torch.ones(9, 3)),
        sample_rate=NEVER,
        unit_ids=np.arange(9) // 3,
        rows_per_unit=2,
    )[2]

    assert next(iter(loader))[0].tolist() == [[0.0] * 3] * 2


def test_an_empty_batch_steps_a_unet_and_crashes_that_of_opacus(lora_unet):
    data = TensorDataset(torch.ones(4, 1, 8, 8), torch.ones(4, 2, 8))
    images, texts = next(iter(Theirs(data, sample_rate=NEVER)))
    assert len(images) == len(texts) == 0
    with pytest.raises(RuntimeError, match="reshape"):
        lora_unet(images, torch.ones(0), texts)

    unet, optimizer, loader = private(
        data, module=lora_unet, sample_rate=NEVER, noise_multiplier=1.0
    )
    before = [p.detach().clone() for p in unet.parameters() if p.requires_grad]
    images, texts = next(iter(loader))
    unet(images, torch.ones(len(images)), texts).sample.square().mean().backward()
    optimizer.step()
    after = [p for p in unet.parameters() if p.requires_grad]
    assert not any(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def test_static_batches_have_one_shape_and_end_where_the_records_do():
    loader = DPDataLoader(Numbers(20), sample_rate=0.5, static_batch=4)
    sizes = {len(batch) for _ in range(5) for batch in loader}

    assert sizes == {4}
    assert [b.tolist() for b in DPDataLoader(Numbers(6), sample_rate=1.0, static_batch=4)] == [
        [0, 1, 2, 3],
        [4, 5, 0, 0],
    ]


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_padding_adds_nothing_to_a_static_batch(reduction, monkeypatch):
    data = TensorDataset(torch.randn(10, 3, generator=torch.Generator().manual_seed(1)))

    def train(static, times=1.0):
        monkeypatch.setattr(loaders, "_zeros", lambda leaf: torch.full_like(leaf, times))
        module, optimizer, loader = private(
            data, sample_rate=1.0, static_batch=static, loss_reduction=reduction
        )
        shapes = []
        for _ in range(3):
            for (x,) in loader:
                shapes.append(len(x))
                getattr(module(x).square().sum(1), reduction)().backward()
                optimizer.step()
                optimizer.zero_grad()
        return weights(module), shapes

    padded, shapes = train(8)
    assert shapes == [8] * 6
    for other in (7.0, -1e20, float("nan")):
        assert torch.equal(train(8, other)[0], padded)
    # Without padding products of other shapes may be summed in another order.
    torch.testing.assert_close(train(None)[0], padded, rtol=1e-5, atol=1e-6)


def test_padding_has_the_types_of_the_records():
    (batch,) = DPDataLoader(Mixed(), sample_rate=1.0, static_batch=6)

    full = default_collate([Mixed()[i] for i in range(4)])
    for name in ("image", "array", "flag"):
        assert batch[name].dtype == full[name].dtype
        assert torch.equal(batch[name][:4], full[name])
        assert not batch[name][4:].any() and len(batch[name]) == 6
    for ours, theirs in zip(batch["pair"], full["pair"], strict=True):
        assert ours.dtype == theirs.dtype and ours.tolist() == [*theirs.tolist(), 0, 0]
    assert batch["text"][:4] == full["text"] and len(batch["text"]) == 6


def test_padding_for_a_numpy_scalar_is_one():
    class Scalars(Numbers):
        def __getitem__(self, index):
            return np.int64(index + 1)

    (batch,) = DPDataLoader(Scalars(2), sample_rate=1.0, static_batch=3, collate_fn=list)
    assert batch == [1, 2, 0] and all(isinstance(x, np.int64) for x in batch)


def test_a_collate_function_of_ones_own_sees_the_padding():
    seen = []

    def join(records):
        seen.append(len(records))
        return {
            "x": torch.stack([x for x, _ in records]),
            "y": torch.tensor([y for _, y in records]),
        }

    class Pairs(Numbers):
        def __getitem__(self, index):
            return torch.ones(2), index + 1

    (batch,) = DPDataLoader(Pairs(3), sample_rate=1.0, static_batch=5, collate_fn=join)
    assert seen[0] == 5 and batch["x"].sum() == 6 and batch["y"].tolist() == [1, 2, 3, 0, 0]


def test_a_dataset_that_gives_many_records_at_once_is_asked_once_a_batch():
    class Table(Numbers):
        asked = ()

        def __getitems__(self, indices):
            self.asked = (*self.asked, list(indices))
            return [index * 10 for index in indices]

    data = Table(4)
    assert [b.tolist() for b in DPDataLoader(data, sample_rate=1.0)] == [[0, 10, 20, 30]]
    assert data.asked == ([0, 1, 2, 3],)
    assert next(iter(DPDataLoader(data, sample_rate=NEVER))).tolist() == []


class Stream(IterableDataset):
    def __iter__(self):
        return iter(range(3))


@pytest.mark.parametrize(
    ("changed", "error", "words"),
    [
        ({"generator": torch.Generator()}, ValueError, "generator must be None"),
        ({"distributed": True}, ValueError, "one process"),
        ({"rand_on_empty": True}, ValueError, "rand_on_empty must be False"),
        ({"batch_first": False}, ValueError, "batch_first must be True"),
        ({"sample_rate": 0.0}, ValueError, "sample_rate must be above 0"),
        ({"sample_rate": 1.1}, ValueError, "sample_rate must be above 0"),
        ({"dataset": Stream()}, TypeError, "indexed by number"),
    ],
)
def test_what_has_no_sound_meaning_is_refused(changed, error, words):
    how = {"dataset": Numbers(4), "sample_rate": 0.5} | changed
    with pytest.raises(error, match=words):
        DPDataLoader(how.pop("dataset"), **how)


def test_a_loader_without_a_size_of_batches_is_refused():
    loader = DataLoader(Numbers(4), batch_sampler=[[0, 1], [2, 3]])
    with pytest.raises(ValueError, match="must have a batch_size"):
        DPDataLoader.from_data_loader(loader)


class Texts(Dataset):
    """Record i has i + 1 tokens, padded to ``length`` where it is given."""

    def __init__(self, length=None) -> None:
        self.length = length

    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> dict:
        tokens = torch.full((index + 1,), index)
        if self.length is not None:
            tokens = nn.functional.pad(tokens, (0, self.length - len(tokens)))
        return {"ids": tokens, "label": index}


def to_the_longest(records: list) -> dict:
    ids = nn.utils.rnn.pad_sequence([r["ids"] for r in records], batch_first=True)
    return {"inputs": {"ids": ids}, "labels": torch.tensor([r["label"] for r in records])}


def like_transformers(records: list):
    return BatchEncoding(to_the_longest(records))


COLLATORS = {
    "a dict": to_the_longest,
    "a tuple": lambda records: tuple(to_the_longest(records)["inputs"].values()),
    "an array": lambda records: to_the_longest(records)["inputs"]["ids"].numpy(),
    "transformers": like_transformers,
}


WORKERS = [(collate, 0) for collate in COLLATORS.values()] + [(to_the_longest, 2)]


@pytest.mark.parametrize(("collate", "workers"), WORKERS, ids=[*COLLATORS, "with workers"])
def test_rows_as_long_as_the_longest_record_are_refused(collate, workers):
    how = {"sample_rate": 1.0, "collate_fn": collate, "num_workers": workers}
    with pytest.raises(PrivacyError, match=r"length of its longest record.* padding='max_length'"):
        next(iter(DPDataLoader(Texts(), **how)))
    next(iter(DPDataLoader(Texts(6), **how)))


@pytest.mark.parametrize(
    "collate",
    [
        lambda records: torch.stack([record["ids"] for record in records]).squeeze(),
        lambda records: torch.cat([record["ids"] for record in records]),
        lambda records: {"both": torch.cat([torch.stack([r["ids"] for r in records])] * 2)},
    ],
    ids=["squeezed", "one after another", "twice the rows"],
)
def test_rows_of_one_length_are_taken_however_they_are_joined(collate):
    assert next(iter(DPDataLoader(Texts(6), sample_rate=1.0, collate_fn=collate))) is not None


def instances_then_class_images(records):
    """As DreamBooth's script joins them for its prior preservation."""
    return torch.stack(
        [record["ids"].float() for record in records] + [torch.ones(6)] * len(records)
    )


def side_by_side(records):
    return torch.cat([torch.stack([record["ids"].float(), torch.ones(6)]) for record in records])


@pytest.mark.parametrize(
    ("collate", "is_refused"), [(instances_then_class_images, True), (side_by_side, False)]
)
def test_rows_of_one_record_stand_next_to_each_other(collate, is_refused):
    model = nn.Linear(6, 2)
    _, _, loader = PrivacyEngine().make_private(
        module=model.train(),
        optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
        data_loader=DataLoader(Texts(6), batch_size=4, collate_fn=collate),
        noise_multiplier=1.0,
        max_grad_norm=1.0,
        draws_per_record=2,
    )
    with pytest.raises(PrivacyError, match="attach_public_loss") if is_refused else nullcontext():
        assert len(next(iter(loader))) == 8


def test_records_of_several_sizes_may_stand_side_by_side():
    def apart(records):
        return [record["ids"] for record in records]

    (batch,) = DPDataLoader(Texts(), sample_rate=1.0, collate_fn=apart)
    assert [len(ids) for ids in batch] == [1, 2, 3, 4]
