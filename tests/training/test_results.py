"""What is written at the end is loaded back, and tried before anything is spent."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from dpengine.models import adapter, family_of
from dpengine.models.base import load_base
from dpengine.settings import DataSettings, Settings
from dpengine.training import results


@pytest.fixture
def trained():
    """The shipped base with an adapter that changes its answers."""
    pipeline = load_base("default")
    objective = family_of(pipeline).make(pipeline)
    adapter.add_lora(
        objective.denoiser, rank=2, alpha=6.0, target_modules=("to_v", "to_out.0"), seed=0
    )
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for param in objective.denoiser.parameters():
            if param.requires_grad:
                param.copy_(torch.randn(param.shape, generator=generator))
    return objective


SETTINGS = Settings(data=DataSettings("digits"))


def test_what_loads_back_as_it_was_trained_is_written(trained, tmp_path):
    results.write_adapter(trained, tmp_path, SETTINGS)
    assert (tmp_path / adapter.WEIGHTS_FILE).is_file()


def lose(state):
    del state[next(name for name in state if "lora_B" in name)]


def change(state):
    name = next(name for name in state if "lora_A" in name)
    state[name] = state[name] * 1.001


@pytest.mark.parametrize(
    ("spoil", "message"),
    [(lose, "cannot be loaded back whole"), (change, "loads back with another")],
)
def test_a_file_that_is_not_what_was_trained_is_refused(
    trained, tmp_path, monkeypatch, spoil, message
):
    save = adapter.save_lora

    def spoiled(denoiser, folder, *part):
        save(denoiser, folder, *part)
        state = load_file(folder / adapter.WEIGHTS_FILE)
        spoil(state)
        save_file(state, folder / adapter.WEIGHTS_FILE)

    monkeypatch.setattr(adapter, "save_lora", spoiled)
    with pytest.raises(ValueError, match=message):
        results.write_adapter(trained, tmp_path, SETTINGS)


def test_a_base_that_changed_meanwhile_is_refused(trained, tmp_path, monkeypatch):
    def changed(base):
        pipeline = load_base(base)
        with torch.no_grad():
            pipeline.unet.conv_in.weight.mul_(1.1)
        return pipeline

    monkeypatch.setattr(results, "load_base", changed)
    with pytest.raises(ValueError, match="gives other outputs than the trained model"):
        results.write_adapter(trained, tmp_path, SETTINGS)


def test_a_rehearsal_leaves_nothing_and_finds_what_would_fail_at_the_end(
    trained, tmp_path, monkeypatch
):
    before = {name: tensor.clone() for name, tensor in trained.denoiser.state_dict().items()}
    needs = {name: param.requires_grad for name, param in trained.denoiser.named_parameters()}
    trained.denoiser.train()
    results.rehearse(trained, SETTINGS)
    assert trained.denoiser.training
    assert needs == {name: p.requires_grad for name, p in trained.denoiser.named_parameters()}
    for name, tensor in trained.denoiser.state_dict().items():
        assert torch.equal(tensor, before[name])

    def fail(*args, **kwargs):
        raise ValueError("the sampler does not fit")

    monkeypatch.setattr(results, "draw_images", fail)
    with pytest.raises(ValueError, match="does not fit"):
        results.rehearse(trained, SETTINGS)
