"""Ways of waiting: each process has its own variables, trains when asked, and is ended."""

import pytest

from bench import threads
from bench.report import cost_tables
from bench.turns import ratio

SHOW = "import os, sys; print(); print(sorted(k for k in os.environ if 'OMP_' in k), flush=True)"


def test_a_process_has_the_variables_of_its_way_and_no_others(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    with threads.process(["-c", SHOW], {"GOMP_SPINCOUNT": "5"}) as child:
        assert child.stdout.readline().strip() == "['GOMP_SPINCOUNT']"


@pytest.mark.parametrize("load", [code for code in threads.LOADS.values() if code is not None])
def test_a_load_runs_until_the_measurement_ends(load):
    with threads.process(["-c", load], {}) as child:
        assert child.poll() is None
    assert child.poll() is not None


def test_a_process_that_ends_is_an_error():
    with (
        pytest.raises(RuntimeError, match="ended before it answered"),
        threads.process(["-c", ""], {}),
    ):
        pass


def test_training_moves_the_weights():
    steps = threads.train(1)
    next(steps)
    optimizer = steps.gi_frame.f_locals["optimizer"]
    before = [param.detach().clone() for param in optimizer.params]
    next(steps)
    moved = zip(before, optimizer.params, strict=True)
    assert any((old != new).any() for old, new in moved)


def test_the_table_has_a_row_for_each_way_and_a_column_for_each_load():
    spread = ratio([2.0, 2.0], [1.0, 1.0])
    entry = {"load": "quiet", "over_ours": {"way": spread}, "draws_per_second": {"way": 640.4}}
    table = cost_tables.threads({"results": {"threads": [entry, entry | {"load": "busy"}]}})
    cell = "2.00 (2.00–2.00), 640 draws/s"
    assert table.splitlines()[0] == "|  | quiet | busy |"
    assert table.splitlines()[-1] == f"| way | {cell} | {cell} |"
