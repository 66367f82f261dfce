"""What runs on a GPU, run here without one: every measurement once, in the interpreter."""

import json
import subprocess
import sys

import pytest
import torch

from bench import gpu, layers
from bench.gpu import timing, tuning
from bench.shapes import SMALL

pytestmark = [
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),
    pytest.mark.skipif(torch.cuda.is_available(), reason="bench.gpu itself runs where a GPU is"),
]

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
    timing.copy_microseconds.cache_clear()


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
    found = tuning.tune(op, SHAPE, torch.bfloat16, deadline=float("inf"))
    assert found["default_us"] == found["best_us"] == 2.0 and len(found["all"]) == 3


def test_tuning_stops_in_time_with_the_default_at_least():
    found = tuning.tune("lora_side_b", SHAPE, torch.bfloat16, deadline=0.0)
    assert len(found["all"]) == 1 and "Tiling(" in found["best"]


def test_a_failure_is_an_entry_and_the_next_measurement_runs(tmp_path):
    report = gpu.Report(tmp_path / "ops.json", seconds=60)
    report.add("ops", {"op": "broken"}, lambda: 1 / 0)
    report.add("ops", {"op": "sound"}, lambda: {"us": 1.0})
    written = json.loads((tmp_path / "ops.json").read_text())
    assert written["ops"] == [{"op": "sound", "us": 1.0}]
    assert "ZeroDivisionError" in written["errors"][0]["error"]


def test_when_time_is_up_what_was_left_out_is_counted_and_written(tmp_path):
    report = gpu.Report(tmp_path / "ops.json", seconds=-1)
    report.add("ops", {"op": "late"}, lambda: {"us": 1.0})
    assert json.loads((tmp_path / "ops.json").read_text()) == {"errors": [], "left_out": 1}


def test_a_section_that_crashes_leaves_an_error_and_the_others_run(tmp_path, monkeypatch):
    def fake(command, **options):
        name = command[command.index("--section") + 1]
        gpu.write(tmp_path / f"{name}.json", {"ops": [name], "errors": [], "left_out": 1})
        return subprocess.CompletedProcess(command, int(name == "step"), "", "illegal access")

    monkeypatch.setattr(subprocess, "run", fake)
    total = {"errors": [], "left_out": 0}
    for name in ("step", "ops"):
        gpu.merge(total, gpu.run_section(name, tmp_path, 1.0))
    assert total["ops"] == ["step", "ops"] and total["left_out"] == 2
    assert total["errors"] == [{"section": "step", "error": "illegal access"}]


@pytest.mark.slow
def test_every_section_measures_and_the_table_tells(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, "SMALL", {"one_record": SHAPE})
    for module in (gpu, timing):
        monkeypatch.setattr(module, "LAYERS", {"small": SHAPE})
        monkeypatch.setattr(module, "MODELS", {"sd15_512": {"small": 2}})
    monkeypatch.setattr(tuning, "_candidates", lambda default: [default])
    monkeypatch.setattr(timing, "_unet_microseconds", lambda batch: 1000.0)
    monkeypatch.setattr(timing, "_integer_rate", lambda: 1e12)
    content = {"device": {"name": "none"}, "errors": [], "left_out": 0}
    for name, (_, run) in gpu.SECTIONS.items():
        if name != "tests":
            report = gpu.Report(tmp_path / f"{name}.json", seconds=600)
            run(report)
            gpu.merge(content, report.content)
    assert content["errors"] == [] and content["left_out"] == 0
    assert {"checks", "noise", "slab", "step", "unet", "ops", "tuning"} <= set(content)
    assert not any(entry["problems"] for entry in content["checks"])
    # Side A and side B of two layers, norms, clipped sum and noise, 2 us each.
    assert content["step"][0]["per_record_us"] == 2 * 2 * 2.0 + 3 * 2.0
    text = gpu.table(content)
    assert "0 wrong, 0 errors" in text and "lora_side_b" in text and "tuned" in text


def test_the_suite_starts_where_only_torch_and_triton_are(tmp_path):
    """No installed dpengine, no diffusers, no cryptography: the kernels alone are loaded."""
    code = """
import sys
class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("diffusers", "peft", "cryptography", "transformers", "scipy"):
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Missing())
sys.meta_path = [f for f in sys.meta_path if "editable" not in str(f)]
import bench.gpu, dpengine.kernels, torch
from bench import cases, shapes
assert "dpengine.optim.optimizer" not in sys.modules
print(dpengine.kernels.ops.sq_norms([torch.ones(2, 4)]).tolist())
"""
    root = gpu.ROOT
    result = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True)
    assert result.stdout.strip() == "[4.0, 4.0]", result.stderr
