"""What a run puts out depends on the private records through the noised sum alone.

Keys, coins and the clock are fixed and every sum is zeros. Runs on neighbouring, spoilt and empty
data with the same public numbers must then write the same bytes everywhere: on the terminal, in
logs, settings, ledger, report, images and checkpoints.
"""

import hashlib
import logging
import os
import shutil
from itertools import count

import numpy as np
import pytest
import torch
import tqdm

from dpengine import finetune
from dpengine.data import records as data
from dpengine.data.records import Records
from dpengine.mechanism import clipping
from dpengine.mechanism.clipping import ClippedSum
from dpengine.training import loop as engine

N = 24
PUBLIC = "--public-dataset-size 30 --sampling-rate 0.5 --clipping"


def records(n: int, *, fill: float | None = None, units: bool = False) -> Records:
    """The first n of a fixed list; all pixels ``fill`` instead, if given."""
    images = torch.rand(100, 1, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1
    images = images if fill is None else torch.full_like(images, fill)
    unit_ids = np.unique(np.arange(n) // 3, return_inverse=True)[1] if units else None
    return Records(images[:n], torch.arange(n) % 10, unit_ids)


DATA = {
    "one record more": dict(n=N + 1),
    "all NaN": dict(n=N, fill=float("nan")),
    "empty": dict(n=0),
}


def zeros(left: ClippedSum, right: ClippedSum) -> ClippedSum:
    return ClippedSum(torch.zeros_like(left.values), left.sensitivity)


@pytest.fixture
def outputs(arguments, run, monkeypatch, capfd, caplog, tmp_path):
    """The bytes of all that a run on some records puts out, by name."""
    monkeypatch.setattr(tqdm.std, "time", lambda: 1e9)
    caplog.set_level(logging.INFO)
    runs = []

    def put_out(content: Records, *options: str) -> dict[str, bytes]:
        numbers = count()

        def urandom(size: int) -> bytes:
            return hashlib.sha512(str(next(numbers)).encode()).digest()[:size]

        monkeypatch.setattr(os, "urandom", urandom)
        monkeypatch.setattr(data, "load", lambda *_: content)
        caplog.clear()
        capfd.readouterr()
        assert finetune.main([*arguments, *options]) == 0
        printed = capfd.readouterr()
        files = [file for file in sorted(run.path.rglob("*")) if file.is_file()]
        everything = {str(file.relative_to(run.path)): file.read_bytes() for file in files}
        everything |= {"stdout": printed.out.encode(), "stderr": printed.err.encode()}
        everything["logs"] = "\n".join(
            f"{record.name} {record.levelname} {record.getMessage()}" for record in caplog.records
        ).encode()
        # Out of sight of the next run, which tells of runs beside it on the same data.
        (tmp_path / f"folder-{len(runs)}").mkdir()
        runs.append(run.path.rename(tmp_path / f"folder-{len(runs)}" / "run"))
        return everything

    yield put_out
    for path in runs:
        shutil.rmtree(path)


def differing(one: dict[str, bytes], other: dict[str, bytes]) -> set[str]:
    return {name for name in one.keys() | other.keys() if one.get(name) != other.get(name)}


@pytest.mark.parametrize("mode", ["flat", pytest.param("adaptive", marks=pytest.mark.slow)])
def test_outputs_depend_on_the_records_through_the_noised_sum_alone(outputs, monkeypatch, mode):
    monkeypatch.setattr(clipping, "join", zeros)
    options = [*PUBLIC.split(), mode]
    expected = outputs(records(N), *options)
    assert {"stdout", "stderr", "ledger.jsonl", "privacy_report.json"} <= expected.keys()
    assert any(name.startswith("checkpoints/") for name in expected)
    for name, changed in DATA.items():
        assert not differing(expected, outputs(records(**changed), *options)), name


@pytest.mark.slow
def test_outputs_depend_on_a_person_through_the_noised_sum_alone(outputs, monkeypatch):
    monkeypatch.setattr(clipping, "join", zeros)
    options = [*PUBLIC.split(), "per-layer", "--rows-per-unit", "2"]
    expected = outputs(records(24, units=True), *options)
    for n in (27, 30, 1):
        assert not differing(expected, outputs(records(n, units=True), *options))


@pytest.mark.slow
def test_outputs_depend_on_a_replaced_record_through_the_noised_sum_alone(outputs, monkeypatch):
    """The number of records is public here, and what they hold is not."""
    monkeypatch.setattr(clipping, "join", zeros)
    expected, other = records(N), records(N)
    other.images[3] = float("nan")
    assert not differing(outputs(expected), outputs(other))
    assert differing(outputs(expected), outputs(records(N + 1)))


@pytest.mark.slow
def test_the_comparison_sees_the_sum_and_a_count(outputs, monkeypatch):
    """Its power: without the zeros the weights differ, with a count of a batch's records stdout."""
    options = [*PUBLIC.split(), "flat"]
    differ = differing(outputs(records(N)), outputs(records(N + 1)))
    assert "pytorch_lora_weights.safetensors" in differ

    monkeypatch.setattr(clipping, "join", zeros)
    draw_rows = engine.draw_rows

    def leaking(everyone, batch, *rest):
        print(len(batch.indices))
        return draw_rows(everyone, batch, *rest)

    monkeypatch.setattr(engine, "draw_rows", leaking)
    one, other = outputs(records(N), *options), outputs(records(0), *options)
    assert differing(one, other) == {"stdout"}
