"""Per-record gradients against single records, and the protocol of slot sets."""

import copy
import gc
import pickle
import weakref

import numpy as np
import pytest
import torch
from torch import nn

from dpengine import Capture, DPOptimizer, PrivacyError
from dpengine.mechanism.batches import BatchNotice
from dpengine.mechanism.private import Private
from dpengine.mechanism.sampling import PhysicalBatch
from dpengine.models import adapter

N = 5


def rows(n_records: int, draws: int, dtype=torch.float32) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    n = n_records * draws
    return {
        "sample": torch.randn(n, 1, 8, 8, generator=generator).to(dtype),
        "timestep": torch.randint(1000, (n,), generator=generator),
        "encoder_hidden_states": torch.randn(n, 2, 8, generator=generator).to(dtype),
        "target": torch.randn(n, 1, 8, 8, generator=generator).to(dtype),
    }


def take(batch: dict[str, torch.Tensor], index) -> dict[str, torch.Tensor]:
    return {name: tensor[index] for name, tensor in batch.items()}


def losses(unet, batch) -> torch.Tensor:
    inputs = {name: tensor for name, tensor in batch.items() if name != "target"}
    error = unet(**inputs).sample - batch["target"]
    return error.square().flatten(1).mean(1)


def per_record_grads(capture: Capture, batch) -> list[torch.Tensor]:
    """Gradients of each record's mean loss over its draws."""
    losses(capture.module, batch).sum().backward()
    return [grad / capture.draws_per_record for grad in capture.take().per_record_grads]


def trainable(unet) -> list[torch.Tensor]:
    return [param for param in unet.parameters() if param.requires_grad]


def alone(unet, batch, draws: int) -> list[torch.Tensor]:
    """The same by one ordinary backward pass for each record."""
    grads = []
    for n in range(len(batch["sample"]) // draws):
        loss = losses(unet, take(batch, slice(n * draws, (n + 1) * draws))).mean()
        grads.append(torch.autograd.grad(loss, trainable(unet)))
    return [torch.stack(column) for column in zip(*grads, strict=True)]


def distance(left: list[torch.Tensor], right: list[torch.Tensor]) -> float:
    squares = [(a - b).double().square().sum() for a, b in zip(left, right, strict=True)]
    return float(sum(squares)) ** 0.5


@pytest.mark.parametrize("draws", [1, 4])
def test_per_record_grads_are_those_of_single_records_in_float64(lora_unet, draws):
    """At most twice as wrong, all tensors together, as float32 backward passes over single ones."""
    exact = alone(copy.deepcopy(lora_unet).double(), rows(N, draws, torch.float64), draws)
    eager = alone(lora_unet, rows(N, draws), draws)
    ours = per_record_grads(Capture(lora_unet, draws_per_record=draws), rows(N, draws))
    assert 0 < distance(ours, exact) <= 2 * distance(eager, exact)


def test_every_lora_tensor_has_a_gradient(lora_unet):
    grads = per_record_grads(Capture(lora_unet), rows(N, 1))
    assert len(grads) == len(trainable(lora_unet)) == 2 * 4 * 8
    assert all((grad.flatten(1).norm(dim=1) > 0).all() for grad in grads)


def test_a_record_has_the_same_bits_in_every_slot(lora_unet):
    """In batches of a multiple of 8 rows; `selfcheck.check_slots` refuses others where it fails."""
    capture, draws, n = Capture(lora_unet, draws_per_record=2), 2, 8
    batch = rows(n, draws)
    first = per_record_grads(capture, batch)
    for shift in range(1, n):
        order = torch.arange(n).roll(shift)
        index = (order[:, None] * draws + torch.arange(draws)).flatten()
        moved = per_record_grads(capture, take(batch, index))
        assert all(torch.equal(a[order], b) for a, b in zip(first, moved, strict=True))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e30, 0.0])
def test_neighbours_change_no_bit_of_a_record(lora_unet, value):
    capture, draws = Capture(lora_unet, draws_per_record=2), 2
    batch = rows(N, draws)
    first = per_record_grads(capture, batch)
    batch["sample"][2 * draws : 4 * draws] = value
    second = per_record_grads(capture, batch)
    untouched = [0, 1, 4]
    for before, after in zip(first, second, strict=True):
        assert torch.equal(before[untouched], after[untouched])


def test_param_grad_stays_none(lora_unet):
    per_record_grads(Capture(lora_unet), rows(N, 1))
    assert all(param.grad is None for param in lora_unet.parameters())


def test_input_gradient_is_that_of_peft(lora_unet):
    batch = rows(N, 1)
    expected = batch["sample"].clone().requires_grad_()
    losses(lora_unet, batch | {"sample": expected}).sum().backward()
    lora_unet.zero_grad()
    ours = batch["sample"].clone().requires_grad_()
    capture = Capture(lora_unet)
    losses(lora_unet, batch | {"sample": ours}).sum().backward()
    capture.take()
    torch.testing.assert_close(ours.grad, expected.grad)


def test_non_reentrant_checkpointing_gives_the_same_gradients(lora_unet):
    capture = Capture(lora_unet)
    plain = per_record_grads(capture, rows(N, 1))
    lora_unet.enable_gradient_checkpointing()
    recomputed = per_record_grads(capture, rows(N, 1))
    for a, b in zip(plain, recomputed, strict=True):
        torch.testing.assert_close(a, b)


def test_evaluation_between_training_steps_is_ordinary(lora_unet):
    expected = losses(lora_unet.eval(), rows(N, 1)).detach()
    capture = Capture(lora_unet.train())
    with torch.no_grad():
        torch.testing.assert_close(losses(lora_unet, rows(N, 1)), expected)
    lora_unet.eval()
    losses(lora_unet, rows(N, 1)).sum().backward()
    with pytest.raises(PrivacyError, match="no per-record gradients"):
        capture.take()


def test_reprs_show_no_private_value(lora_unet):
    capture = Capture(lora_unet)
    capture.announcements.announce(BatchNotice(Private(3), N, is_first=True, is_last=True))
    losses(lora_unet, rows(N, 1)).sum().backward()
    assert "tensor" not in repr(capture.take())
    assert repr(BatchNotice(Private(7), N, is_first=True, is_last=True)).count("7") == 0


def test_an_ordinary_gradient_is_refused(lora_unet):
    capture = Capture(lora_unet)
    losses(lora_unet.eval(), rows(N, 1)).sum().backward()
    lora_unet.train()
    losses(lora_unet, rows(N, 1)).sum().backward()
    with pytest.raises(PrivacyError, match="ordinary gradient"):
        capture.take()


def test_disabled_adapters_run_the_base_model(tiny_unet):
    base = losses(tiny_unet.train(), rows(N, 1)).detach()
    adapter.add_lora(tiny_unet, rank=2, alpha=3.0, target_modules=("to_v",), seed=0)
    Capture(tiny_unet)
    tiny_unet.disable_adapters()
    torch.testing.assert_close(losses(tiny_unet, rows(N, 1)), base)


def test_two_forwards_of_one_batch_add_up(lora_unet):
    capture = Capture(lora_unet)
    once = per_record_grads(capture, rows(N, 1))
    (losses(lora_unet, rows(N, 1)) + losses(lora_unet, rows(N, 1))).sum().backward()
    for a, b in zip(once, capture.take().per_record_grads, strict=True):
        torch.testing.assert_close(2 * a, b)


def test_a_second_backward_is_refused(lora_unet):
    capture = Capture(lora_unet)
    loss = losses(lora_unet, rows(N, 1)).sum()
    loss.backward(retain_graph=True)
    with pytest.raises(PrivacyError, match="twice"):
        loss.backward()
    assert capture.take().n_rows == N


def test_take_is_refused_without_a_backward_and_a_second_time(lora_unet):
    capture = Capture(lora_unet)
    losses(lora_unet, rows(N, 1))
    with pytest.raises(PrivacyError, match="no per-record gradients"):
        capture.take()
    losses(lora_unet, rows(N, 1)).sum().backward()
    capture.take()
    with pytest.raises(PrivacyError, match="no per-record gradients"):
        capture.take()


def test_a_forward_before_take_is_refused(lora_unet):
    Capture(lora_unet)
    losses(lora_unet, rows(N, 1)).sum().backward()
    with pytest.raises(PrivacyError, match="step"):
        losses(lora_unet, rows(N, 1))


def test_batches_of_different_size_cannot_share_a_set(lora_unet):
    Capture(lora_unet)
    losses(lora_unet, rows(N, 1))
    with pytest.raises(PrivacyError, match="same records"):
        losses(lora_unet, rows(N + 1, 1))


def test_rows_must_be_whole_records(lora_unet):
    Capture(lora_unet, draws_per_record=2)
    with pytest.raises(ValueError, match="draws_per_record = 2"):
        losses(lora_unet, rows(N, 1))


def test_a_set_takes_the_notice_of_its_batch(lora_unet):
    capture, taken = Capture(lora_unet), []
    for notice in (
        BatchNotice(Private(3), N, is_first=True, is_last=False),
        BatchNotice(Private(0), N, is_first=True, is_last=True),
    ):
        capture.announcements.announce(notice)
        losses(lora_unet, rows(N, 1)).sum().backward()
        taken.append(capture.take())
    assert [batch.is_record.tolist() for batch in taken] == [[True] * 3 + [False] * 2, [False] * N]
    assert [batch.is_last for batch in taken] == [False, True]


@pytest.mark.parametrize("progress", ["skipped", "forward only", "backward only"])
def test_a_batch_left_before_take_is_refused_at_the_next(lora_unet, progress):
    """Its place in the logical batch would pass to the next batch, and a record count twice."""
    capture = Capture(lora_unet)
    capture.announcements.announce(BatchNotice(Private(N), N, is_first=True, is_last=False))
    if progress != "skipped":
        loss = losses(lora_unet, rows(N, 1)).sum()
        if progress == "backward only":
            loss.backward()
    with pytest.raises(PrivacyError, match="last batch was not used"):
        capture.announcements.announce(BatchNotice(Private(N), N, is_first=True, is_last=True))
    capture.reset()
    capture.announcements.announce(BatchNotice(Private(N), N, is_first=True, is_last=True))


def test_a_batch_that_was_not_announced_is_refused(lora_unet):
    capture = Capture(lora_unet)
    capture.announcements.announce(BatchNotice(Private(N), N, is_first=True, is_last=True))
    losses(lora_unet, rows(N, 1)).sum().backward()
    capture.take()
    with pytest.raises(PrivacyError, match="did not announce"):
        losses(lora_unet, rows(N, 1))


def test_a_batch_of_another_size_than_announced_is_refused(lora_unet):
    Capture(lora_unet).announcements.announce(
        BatchNotice(Private(N), N, is_first=True, is_last=True)
    )
    with pytest.raises(PrivacyError, match="another size"):
        losses(lora_unet, rows(N + 1, 1))


def test_a_module_without_trainable_tensors_is_refused(tiny_unet):
    with pytest.raises(ValueError, match="no trainable tensor"):
        Capture(tiny_unet.requires_grad_(False))


def test_batch_norm_is_refused(lora_unet):
    lora_unet.conv_norm_out = torch.nn.BatchNorm2d(8).requires_grad_(False)
    with pytest.raises(ValueError, match="mixes the records"):
        Capture(lora_unet)


def test_half_precision_adapters_are_refused(lora_unet):
    with pytest.raises(TypeError, match="must be float32"):
        Capture(lora_unet.half())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_what_is_trained_must_be_float32_and_the_way_is_not_of_one_library(dtype):
    with pytest.raises(TypeError, match=r"got torch\.\w+: cast it .* all with module\.float\(\)"):
        Capture(torch.nn.Linear(2, 2).to(dtype))
    Capture(torch.nn.Linear(2, 2).to(dtype).float())


def test_a_module_cannot_be_captured_twice(lora_unet):
    Capture(lora_unet)
    with pytest.raises(ValueError, match="captured already"):
        Capture(lora_unet)


@pytest.mark.parametrize("make", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_a_copy_of_a_captured_module_is_an_ordinary_module(lora_unet, make):
    """Its passes take no part in a batch; captured, it has gradients of its own."""
    capture = Capture(lora_unet)
    expected = per_record_grads(capture, rows(N, 1))
    twin = make(lora_unet)
    losses(twin, rows(N, 1)).sum().backward()
    for param, grads in zip(trainable(twin), expected, strict=True):
        torch.testing.assert_close(param.grad, grads.sum(0), rtol=1e-4, atol=1e-6)
    with pytest.raises(PrivacyError, match="no per-record gradients"):
        capture.take()
    twin.zero_grad()
    for a, b in zip(per_record_grads(Capture(twin), rows(N, 1)), expected, strict=True):
        torch.testing.assert_close(a, b)


def test_without_hooks_the_module_has_ordinary_gradients(lora_unet):
    capture = Capture(lora_unet)
    expected = per_record_grads(capture, rows(N, 1))
    capture.disable_hooks()
    losses(lora_unet, rows(N, 1)).sum().backward()
    for param, grads in zip(trainable(lora_unet), expected, strict=True):
        torch.testing.assert_close(param.grad, grads.sum(0), rtol=1e-4, atol=1e-6)
    lora_unet.zero_grad()
    with capture.suspended():
        pass
    losses(lora_unet, rows(N, 1)).sum().backward()
    assert all(param.grad is not None for param in trainable(lora_unet))
    lora_unet.zero_grad()
    capture.enable_hooks()
    for a, b in zip(per_record_grads(capture, rows(N, 1)), expected, strict=True):
        assert torch.equal(a, b)
    losses(lora_unet, rows(N, 1)).sum()
    with pytest.raises(PrivacyError, match="while a batch is being processed"):
        capture.disable_hooks()


def test_detach_gives_the_module_back(lora_unet):
    capture = Capture(lora_unet)
    capture.detach()
    capture.cleanup()  # once more does nothing
    losses(lora_unet, rows(N, 1)).sum().backward()
    assert all(param.grad is not None for param in trainable(lora_unet))
    lora_unet.zero_grad()
    assert per_record_grads(Capture(lora_unet), rows(N, 1))


def test_a_capture_does_not_keep_its_module_alive(lora_unet):
    """The map from tensors to captures must not hold what it maps."""
    twin = copy.deepcopy(lora_unet)
    reference = weakref.ref(twin)
    Capture(twin)
    del twin
    gc.collect()
    assert reference() is None


def test_fused_adapters_evaluate_and_do_not_train(lora_unet):
    Capture(lora_unet)
    lora_unet.fuse_lora()
    with torch.no_grad():
        losses(lora_unet, rows(N, 1))
    with pytest.raises(ValueError, match="merged adapter"):
        losses(lora_unet, rows(N, 1))


def test_dropout_is_refused(lora_unet):
    lora_unet.up_blocks[1].resnets[0].dropout.p = 0.1
    with pytest.raises(ValueError, match=r"resnets\.0\.dropout.* has dropout 0\.1"):
        Capture(lora_unet)


def test_reentrant_checkpointing_is_refused(lora_unet):
    Capture(lora_unet)

    def reentrant(function, *args):
        return torch.utils.checkpoint.checkpoint(function, *args, use_reentrant=True)

    lora_unet.enable_gradient_checkpointing(reentrant)
    sample = rows(N, 1)["sample"].requires_grad_()
    with pytest.raises(PrivacyError, match="non-reentrant"):
        losses(lora_unet, rows(N, 1) | {"sample": sample})


def test_a_layer_outside_the_module_forward_is_refused(lora_unet):
    Capture(lora_unet)
    layer = lora_unet.up_blocks[1].attentions[0].transformer_blocks[0].attn1.to_q
    with pytest.raises(PrivacyError, match="outside a forward pass"):
        layer(torch.zeros(N, 4, 8))


def test_state_dict_and_class_are_unchanged(lora_unet):
    names, kind = list(lora_unet.state_dict()), type(lora_unet)
    Capture(lora_unet)
    assert list(lora_unet.state_dict()) == names
    assert type(lora_unet) is kind


def test_a_module_that_is_cast_after_its_capture_is_refused(lora_unet):
    """Autograd would round the gradients after their rule has made them."""
    capture = Capture(lora_unet)
    lora_unet.to(torch.bfloat16)
    batch = {name: t.bfloat16() if t.is_floating_point() else t for name, t in rows(N, 1).items()}
    with pytest.raises(TypeError, match="must be float32"):
        per_record_grads(capture, batch)


class Inside(nn.Module):
    """A linear layer behind whatever ``disturb`` does to the input."""

    def __init__(self, disturb) -> None:
        super().__init__()
        self.layer, self.disturb = nn.Linear(3, 2), disturb
        self.register_buffer("average", torch.zeros(()))

    def forward(self, x):
        return self.layer(self.disturb(self, x))


def keep_average(module, x):
    module.average.lerp_(x.detach().mean(), 0.5)
    return x


def replace_average(module, x):
    module.average = module.average + x.detach().mean()
    return x


@pytest.mark.parametrize(
    ("disturb", "message"),
    [
        (replace_average, "wrote into 'average'"),
        (keep_average, "wrote into 'average'"),
        (lambda _, x: nn.functional.dropout(x, 0.5), "drew from torch's generator"),
        (lambda _, x: x + torch.randn_like(x), "drew from torch's generator"),
    ],
    ids=["buffer replaced", "buffer", "dropout", "noise"],
)
def test_what_a_forward_pass_leaves_behind_or_draws_is_refused(disturb, message):
    model = Inside(disturb).train()
    Capture(model)
    with pytest.raises(PrivacyError, match=message):
        model(torch.randn(4, 3))


def test_a_pass_that_leaves_nothing_behind_is_not_refused():
    model = Inside(lambda _, x: x).train()
    capture = Capture(model)
    torch.randn(3)  # before and after a pass, the generator is the user's
    loss = model(torch.randn(4, 3)).sum()
    torch.randn(3)
    model.eval()(torch.randn(2, 3))
    model.train()
    loss.backward()
    assert len(capture.take().per_record_grads) == 2


@pytest.mark.parametrize("change", ["frozen", "trained", "replaced", "layer", "tensor"])
def test_tensors_that_begin_or_end_to_train_after_capture_are_refused(change):
    model = nn.Sequential(nn.Linear(3, 3).requires_grad_(False), nn.Linear(3, 2)).train()
    capture = Capture(model)
    if change == "frozen":
        model[1].bias.requires_grad_(False)
    elif change == "trained":
        model[0].weight.requires_grad_(True)
    elif change == "layer":
        model.append(nn.Linear(2, 2))
    elif change == "tensor":
        model[1].register_parameter("scale", nn.Parameter(torch.ones(2)))
    else:
        model[1].weight = nn.Parameter(torch.ones(2, 3))
    with pytest.raises(PrivacyError, match="detach"):
        model(torch.randn(4, 3)).sum().backward()
        capture.take()


def test_a_gradient_penalty_is_refused(lora_unet):
    Capture(lora_unet)
    loss = losses(lora_unet, rows(N, 1)).sum()
    with pytest.raises(PrivacyError, match="create_graph"):
        loss.backward(create_graph=True)


def test_rows_are_counted_inside_of_containers():
    class Named(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Linear(3, 1)

        def forward(self, batch):
            return self.inner(batch["x"])

    model = Named().train()
    capture = Capture(model)
    model({"name": "x", "x": torch.ones(4, 3)}).sum().backward()
    assert len(capture.take().is_record) == 4


def test_a_recurrent_layer_is_refused_by_name():
    with pytest.raises(TypeError, match="'0' is a recurrent LSTM"):
        Capture(nn.Sequential(nn.LSTM(2, 2)))


@pytest.mark.parametrize("norm_only", [False, True])
def test_what_holds_a_batch_does_not_tell_its_size(norm_only):
    module = torch.nn.Linear(2, 2).train()
    capture = Capture(module, norm_only=norm_only)
    module(torch.ones(37, 2)).sum().backward()
    open_set, taken = repr(capture._set), capture.take()
    held = [repr(grads) for grads in taken.grads.whole if not isinstance(grads, torch.Tensor)]
    drawn = repr(PhysicalBatch(np.arange(37)[:, None], 37, is_first=True, is_last=True))
    shown = (open_set, repr(taken), drawn, *held)
    assert not any(told in text for text in shown for told in ("37", "is_first", "is_last"))


def test_a_batch_that_does_not_fit_is_told_the_order_of_rows():
    module = torch.nn.Linear(2, 2).train()
    Capture(module, draws_per_record=2)
    with pytest.raises(ValueError, match=r"row n \* K \+ k for record n.*must not be in it"):
        module(torch.ones(3, 2))


def normalised() -> torch.nn.Sequential:
    layers = torch.nn.Linear(4, 4), torch.nn.BatchNorm1d(4).requires_grad_(False)
    return torch.nn.Sequential(*layers, torch.nn.Linear(4, 2)).train()


def test_a_frozen_batch_norm_that_is_held_in_eval_mode_is_taken():
    model = normalised()
    model[1].eval()
    capture = Capture(model)
    model(torch.randn(N, 4)).sum().backward()
    assert len(capture.take().per_record_grads) == 4


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_batch_norm_in_training_mode_is_refused(when):
    model = normalised()
    if when == "before":
        with pytest.raises(ValueError, match=r"BatchNorm1d.*hold it in eval mode"):
            Capture(model)
        return
    model[1].eval()
    Capture(model)
    with pytest.raises(PrivacyError, match=r"'1\.(running_mean|running_var|num_batches_tracked)'"):
        model.train()(torch.randn(N, 4))


def test_a_forgotten_train_is_told():
    model = torch.nn.Linear(3, 2).eval()
    optimizer = DPOptimizer(
        torch.optim.SGD(Capture(model).parameters, lr=0.1),
        noise_multiplier=1.0,
        max_grad_norm=1.0,
        expected_batch_size=4.0,
    )
    model(torch.randn(2, 3)).sum().backward()
    with pytest.raises(PrivacyError, match=r"in eval mode.*call its train\(\)"):
        optimizer.step()
