"""The measures of the engine: what they count, and the goals that no machine can blur."""

import json
import sys
from collections import Counter
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch

import bench
from bench import engine, gpu, timing, training
from bench.shapes import LAYERS, MODELS

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")


def counted(run):
    with engine.OpCounter() as counter:
        run()
    return {name.removeprefix("aten."): count for name, count in counter.counts.items()}


def test_operators_are_counted_once_each_and_views_not():
    x = torch.arange(6.0).view(2, 3)

    def run():
        y = x.T[:, :1].expand(3, 2).detach()  # views alone
        y.reshape(6)  # not contiguous: a copy, and a view of it that hides itself
        x.mT @ x  # one product of two dimensions
        (x + 1).mul_(2).sum()  # in place is an operator too
        torch._foreach_add_([x.clone(), x.clone()], 1.0)

    assert counted(run) == {
        "clone.default": 3,
        "mm.default": 1,
        "add.Tensor": 1,
        "mul_.Tensor": 1,
        "sum.default": 1,
        "_foreach_add_.Scalar": 1,
    }


def test_the_backward_pass_and_the_update_are_counted_too():
    layer = torch.nn.Linear(3, 2, bias=False)
    sgd, x = torch.optim.SGD(layer.parameters(), lr=0.1), torch.ones(4, 3)

    def step():
        layer(x).sum().backward()  # y = x Wᵀ, its sum; the gradient of that: gᵀ x
        sgd.step()  # W += -lr grad
        sgd.zero_grad()

    step()
    counts = counted(step)
    assert counts.pop("ones_like.default") == 1  # the gradient of the loss, which is 1
    assert counts == {"mm.default": 2, "sum.default": 1, "add_.Tensor": 1}


def test_a_step_of_ours_dispatches_fewer_operators_than_the_non_private_one():
    task = training.small(size=4)
    trainable = [p for p in task.make_model().parameters() if p.requires_grad]
    assert len(trainable) == 56
    for optimizer in engine.OPTIMIZERS:
        counts = {
            e["impl"]: e["ops"] for e in engine.measure_ops(task, 2) if e["optimizer"] == optimizer
        }
        assert counts["dpengine"] < counts["non-private"] < counts["opacus hooks"]


def test_private_memory_is_that_of_the_per_record_gradients():
    """On images of 4 x 4 pixels the activations are small and hide nothing."""
    (entry,) = engine.measure_memory(lambda rank: training.small(rank, size=4), (64,), (64,))
    # to_q, to_k, to_v and to_out.0 of three layers of 32 channels and four of 64.
    assert entry["parameters"] == 4 * 64 * 2 * (3 * 32 + 4 * 64)
    assert 0.5 < entry["above_non_private"]["dpengine"] <= 1.1


def test_both_private_steps_clip_alike_and_clip_at_all():
    task = training.small(size=8)
    assert training.disagreement(task, 4) < engine.AGREEMENT
    clipped, plain = (training.update(task, impl, 4).norm() for impl in engine.IMPLS[1::-1])
    assert clipped <= training.MAX_GRAD_NORM < plain


def test_a_model_is_the_same_each_time_and_its_factors_are_not_zero():
    first, second = (training.small(size=8).make_model() for _ in range(2))
    pairs = list(zip(first.parameters(), second.parameters(), strict=True))
    assert all(torch.equal(*pair) for pair in pairs)
    assert all(param.count_nonzero() for param, _ in pairs if param.requires_grad)


def test_steps_take_turns_and_each_comes_first_as_often():
    order = []
    times = engine.take_turns({name: partial(order.append, name) for name in "abc"}, rounds=3)
    assert "".join(order) == "abcbcacab"
    assert [len(taken) for taken in times.values()] == [3, 3, 3]


def test_a_ratio_has_the_spread_of_the_rounds():
    found = engine.ratio([2.0, 6.0, 4.0, 8.0], [2.0, 3.0, 2.0, 2.0])
    assert found["of_medians"] == 5.0 / 2.0 and found["of_fastest"] == 1.0
    # Ratios within rounds 1, 2, 2 and 4; quartiles as `statistics` defines them.
    assert (found["quartile_1"], found["quartile_3"]) == (1.25, 3.5)


def test_the_line_and_what_it_misses():
    straight = engine.fit_line([1, 2, 4], [5.0, 7.0, 11.0])
    assert straight["slope"] == pytest.approx(2) and straight["intercept"] == pytest.approx(3)
    assert straight["residual"] < 1e-12
    # 0, 1, 0 at 0, 1, 2: the best line is flat at 1/3 and misses by 1/3, 2/3, 1/3.
    bent = engine.fit_line([0, 1, 2], [0.0, 1.0, 0.0])
    assert bent["residual"] == pytest.approx(np.sqrt((1 + 4 + 1) / 27) * 3)


@pytest.mark.slow
@pytest.mark.parametrize("quantity", engine.QUANTITIES)
def test_what_privacy_adds_is_linear_in_every_quantity(quantity, monkeypatch):
    """In the floating-point operations, which are the same on every machine."""
    monkeypatch.setattr(engine, "small", partial(training.small, size=4))
    values = (16, 64, 144) if quantity == "tokens" else engine.QUANTITIES[quantity][2][:3]
    entry = engine.measure_growth(quantity, values, n_records=1, rounds=1)
    assert entry["line_of_flops_above_non_private"]["residual"] < 0.02
    for impl in engine.IMPLS[:2]:
        assert len(entry[impl]["ms"]) == len(entry[impl]["ops"]) == 3 and min(entry[impl]["ms"]) > 0


@pytest.mark.slow
def test_everything_is_measured_written_drawn_and_told(tmp_path, monkeypatch, capsys):
    two = {"draws": (1, 2), "rank": (4, 8)}
    few = engine.Sizes(4, 1, {2: 2}, 4, (2,), (4,), 1, 2, two)
    monkeypatch.setattr(engine, "Sizes", lambda: few)
    out, figure = tmp_path / "engine.json", tmp_path / "growth.png"
    monkeypatch.setattr(sys, "argv", ["engine", "--out", str(out), "--figure", str(figure)])
    engine.main()
    written = json.loads(out.read_text())
    assert {"device", "torch", "commit", "ops", "time", "memory", "growth"} <= set(written)
    assert written["torch"] == torch.__version__ and figure.read_bytes()[1:4] == b"PNG"
    printed = capsys.readouterr().out
    for words in ("operators of a step", "opacus hooks / dpengine", "peak memory", "growth"):
        assert words in printed


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
    report = gpu.Report(tmp_path / "engine.json", seconds=600)
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
    report = gpu.Report(tmp_path / "engine.json", seconds=600)
    gpu.add_engine(report)
    (entry,) = report.content["skipped"]
    assert "needs dpengine, diffusers and peft" in entry["reason"]
    content = {"device": {"name": "none"}, **report.content}
    assert "skipped engine: it needs" in gpu.table(content)
