"""The steps that are compared: what they share, and the goals that no machine can blur."""

import sys
from collections import Counter
from dataclasses import replace
from functools import partial

import pytest
import torch

import bench
from bench import gpu, training
from bench.counting import count_ops
from bench.gpu import timing
from bench.shapes import LAYERS, MODELS
from dpengine.execution.memory import peak_bytes

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")


def step(task, impl, n_records, make_optimizer=training.adamw):
    started, inputs = training.start(task, impl, make_optimizer, n_records), task.inputs(n_records)
    started.step(*inputs)  # the optimizer's state is made
    return partial(started.step, *inputs)


@pytest.mark.parametrize("make_optimizer", [training.adamw, partial(torch.optim.SGD, lr=1e-3)])
def test_a_step_of_ours_dispatches_fewer_operators_than_the_non_private_one(make_optimizer):
    task = training.small(size=4)
    trainable = [p for p in task.make_model().parameters() if p.requires_grad]
    assert len(trainable) == 56
    counts = {impl: count_ops(step(task, impl, 2, make_optimizer)) for impl in training.IMPLS}
    assert counts["dpengine"] < counts["non-private"] < counts["opacus hooks"]


def test_private_memory_is_that_of_the_per_record_gradients():
    """On images of 4 x 4 pixels the activations are small and hide nothing."""
    task, n_records = training.small(rank=64, size=4), 64
    n_params = sum(p.numel() for p in task.make_model().parameters() if p.requires_grad)
    # to_q, to_k, to_v and to_out.0 of three layers of 32 channels and four of 64.
    assert n_params == 4 * 64 * 2 * (3 * 32 + 4 * 64)
    ours, plain = (
        peak_bytes(step(task, impl, n_records), torch.device("cpu"))
        for impl in ("dpengine", "non-private")
    )
    assert 0.5 < (ours - plain) / (4 * n_records * n_params) <= 1.1


def test_a_model_is_the_same_each_time_and_its_factors_are_not_zero():
    first, second = (training.small(size=8).make_model() for _ in range(2))
    pairs = list(zip(first.parameters(), second.parameters(), strict=True))
    assert all(torch.equal(*pair) for pair in pairs)
    assert all(param.count_nonzero() for param, _ in pairs if param.requires_grad)


@pytest.mark.parametrize("name", training.MODELS)
def test_the_models_have_the_adapted_layers_that_the_kernels_are_timed_at(name):
    with torch.device("meta"):
        unet = training.add_lora(training.MODELS[name].make(), rank=4)
    found = Counter((m.in_features, m.out_features) for m in unet.modules() if hasattr(m, "lora_A"))
    expected: Counter = Counter()
    for layer, count in MODELS[name].items():
        expected[LAYERS[layer].in_features, LAYERS[layer].out_features] += count
    assert found == expected


def test_the_section_of_the_gpu_suite_runs_every_implementation(tmp_path, monkeypatch):
    monkeypatch.setattr(timing, "DEVICE", "cpu")
    report = gpu.Report(tmp_path / "gpu.json", seconds=600)
    gpu.add_engine(report)
    assert report.content["errors"] == [] and "skipped" not in report.content
    assert {entry["impl"] for entry in report.content["engine"]} == set(training.IMPLS)
    for entry in report.content["engine"]:
        assert entry["images_per_s"] == pytest.approx(2 * 1000 / entry["ms"])
    assert [entry["largest_batch"] for entry in report.content["largest_batch"]] == [2, 2, 2]


def test_memory_that_runs_out_ends_the_search_for_the_largest_batch(monkeypatch):
    monkeypatch.setattr(training, "_TINY", replace(training._TINY, batch=8))

    def start(task, impl, make_optimizer, n_records):
        def step(rows, *_):
            if len(rows) > 4:
                raise torch.OutOfMemoryError

        return training.Training(step, [])

    monkeypatch.setattr(training, "start", start)
    assert training.largest_batch("tiny", "dpengine", "cpu") == {"largest_batch": 4}


def test_the_section_says_why_it_is_skipped(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "bench.training", None)
    monkeypatch.delattr(bench, "training")
    report = gpu.Report(tmp_path / "gpu.json", seconds=600)
    gpu.add_engine(report)
    (entry,) = report.content["skipped"]
    assert "needs dpengine, diffusers and peft" in entry["reason"]
    content = {"device": {"name": "none"}, **report.content}
    assert "skipped engine: it needs" in gpu.table(content)
