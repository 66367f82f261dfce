"""What runs on a GPU, run here without one: every measurement once, in the interpreter."""

import json
import time

import pytest
import torch

from bench import gpu, layers, timing, tuning
from bench.shapes import SMALL

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

SHAPE = SMALL["one_record"]


@pytest.fixture(autouse=True)
def no_gpu(monkeypatch):
    """One call instead of many timed ones, on the CPU."""

    def once(calls, seconds=0.0):
        calls[0]()
        return 2.0

    monkeypatch.setattr(timing, "DEVICE", "cpu")
    monkeypatch.setattr(timing, "CACHE_BYTES", 0)
    monkeypatch.setattr(timing, "N_VALUES", 100)
    monkeypatch.setattr(timing, "microseconds", once)
    monkeypatch.setattr(gpu, "_device", lambda: {"name": "none"})


@pytest.mark.parametrize("impl", layers.IMPLS)
@pytest.mark.parametrize("op", layers.USED)
def test_every_op_is_timed_beside_its_peers(op, impl):
    entry = timing.measure_op(op, impl, SHAPE, torch.bfloat16)
    assert entry["us"] == 2.0 and entry["share_of_copy"] == 1.0
    assert entry["gb_per_s"] == pytest.approx(entry["bytes"] / 2000)


@pytest.mark.parametrize("impl", layers.IMPLS)
@pytest.mark.parametrize("op", ["clip_and_sum", "sq_norms"])
def test_the_slab_is_timed(op, impl):
    assert timing.measure_slab(op, impl, 3)["gb_per_s"] == pytest.approx(3 * 100 * 4 / 2000)


@pytest.mark.parametrize("op", gpu.OPS)
def test_tuning_tries_other_blocks_beside_the_default(op, monkeypatch):
    few = tuning._candidates
    monkeypatch.setattr(tuning, "_candidates", lambda default: few(default)[:3])
    found = tuning.tune(op, SHAPE, torch.bfloat16)
    assert found["default_us"] == found["best_us"] == 2.0 and len(found["all"]) == 3


def test_a_failure_is_an_entry_and_the_next_measurement_runs(tmp_path):
    report = gpu.Report(tmp_path / "gpu.json", seconds=60)
    report.add("ops", {"op": "broken"}, lambda: 1 / 0)
    report.add("ops", {"op": "sound"}, lambda: {"us": 1.0})
    written = json.loads((tmp_path / "gpu.json").read_text())
    assert written["ops"] == [{"op": "sound", "us": 1.0}]
    assert "ZeroDivisionError" in written["errors"][0]["error"]


def test_when_time_is_up_what_was_left_out_is_named(tmp_path):
    report = gpu.Report(tmp_path / "gpu.json", seconds=-1)
    report.add("ops", {"op": "late"}, lambda: {"us": 1.0})
    assert report.content["errors"] == [{"section": "ops", "op": "late", "error": "out of time"}]
    assert "ops" not in report.content


def test_everything_is_measured_and_the_table_tells(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, "SMALL", {"one_record": SHAPE})
    for module in (gpu, timing):
        monkeypatch.setattr(module, "LAYERS", {"small": SHAPE})
        monkeypatch.setattr(module, "MODELS", {"sd15_512": {"small": 2}})
    monkeypatch.setattr(gpu, "add_tests", lambda report: None)
    monkeypatch.setattr(gpu, "DTYPES", (torch.bfloat16,))
    monkeypatch.setattr(tuning, "_candidates", lambda default: [default])
    monkeypatch.setattr(timing, "_unet_microseconds", lambda batch: 1000.0)
    monkeypatch.setattr(timing, "_integer_rate", lambda: 1e12)
    report = gpu.Report(tmp_path / "gpu.json", seconds=time.monotonic() + 600)
    gpu.measure_all(report)
    assert report.content["errors"] == []
    assert {"checks", "noise", "slab", "step", "ops", "tuning"} <= set(report.content)
    assert not any(entry["problems"] for entry in report.content["checks"])
    step = report.content["step"][0]
    # Side A and side B of two layers, the clipped sum and the noise, 2 us each.
    assert step["per_record_us"] == 2 * 2 * 2.0 + 2.0 + 2.0
    text = gpu.table(report.content)
    assert "0 wrong, 0 errors" in text and "lora_side_b" in text and "tuned" in text
