"""Accuracy of a classifier trained on synthetic digits."""

from dpengine import evaluate


def test_a_folder_that_is_no_run_is_refused(tmp_path, capsys):
    assert evaluate.main(["--run", str(tmp_path)]) == 2
    assert "not the folder of a run" in capsys.readouterr().err
