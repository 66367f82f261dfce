"""The loss of a batch: rows that do not see each other, and a float64 hand computation."""

import pytest
import torch
from diffusers import DDIMScheduler, UNet2DConditionModel

from dpengine.models import (
    FAMILIES,
    ClassConditionalPipeline,
    ClassEmbedding,
    make_path,
    row_losses,
    synthetic_rows,
)


@pytest.fixture
def objective():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        unet = UNet2DConditionModel(
            sample_size=8,
            in_channels=1,
            out_channels=1,
            block_out_channels=(8,),
            layers_per_block=1,
            down_block_types=("CrossAttnDownBlock2D",),
            mid_block_type=None,
            up_block_types=("UpBlock2D",),
            cross_attention_dim=8,
            attention_head_dim=2,
            norm_num_groups=4,
        )
        classes = ClassEmbedding(8, ["a", "b", "c"])
    scheduler = DDIMScheduler(prediction_type="v_prediction")
    pipeline = ClassConditionalPipeline(unet.double(), scheduler, classes.double())
    return FAMILIES["ClassConditionalPipeline"].make(pipeline)


@pytest.fixture
def batch(objective):
    rows = synthetic_rows(objective, make_path(objective.pipeline.scheduler), 4)
    return {n: t.double() if t.is_floating_point() else t for n, t in rows.items()}


def test_losses_are_those_of_single_rows(objective, batch):
    path = make_path(objective.pipeline.scheduler)
    losses = row_losses(objective, path, batch)
    for row, loss in enumerate(losses):
        x, noise = batch["latents"][row], batch["diffusion_noise"][row]
        t = batch["times"][row]
        signal, spread = path.signal[t].double(), path.spread[t].double()
        token = objective.pipeline.class_embedding.embedding.weight[batch["labels"][row]]
        noisy = signal * x + spread * noise
        answer = objective.denoiser(noisy[None], t, encoder_hidden_states=token[None, None]).sample
        expected = (answer[0] - (signal * noise - spread * x)).square().mean()
        torch.testing.assert_close(loss, expected, rtol=1e-9, atol=0)


def test_a_rows_loss_ignores_the_other_rows(objective, batch):
    path = make_path(objective.pipeline.scheduler)
    before = row_losses(objective, path, batch)
    batch["latents"][1:] *= 100
    batch["diffusion_noise"][1:] -= 7
    batch["labels"][1:] = 0
    after = row_losses(objective, path, batch)
    torch.testing.assert_close(after[0], before[0], rtol=1e-12, atol=0)
    assert (after[1:] != before[1:]).all()


def test_weights_multiply_the_losses_of_their_times(objective, batch):
    path = make_path(objective.pipeline.scheduler)
    weighted = path.with_min_snr(5.0)
    expected = row_losses(objective, path, batch) * weighted.weights[batch["times"]]
    torch.testing.assert_close(row_losses(objective, weighted, batch), expected)


def test_no_two_synthetic_records_are_alike_and_all_are_the_same_again(objective):
    path = make_path(objective.pipeline.scheduler)
    rows, again = (synthetic_rows(objective, path, 6) for _ in range(2))
    assert all(torch.equal(rows[name], again[name]) for name in rows)
    assert next(iter(rows)) == "latents"
    assert len(rows["latents"].flatten(1).unique(dim=0)) == 6
