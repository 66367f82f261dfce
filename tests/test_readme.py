"""The README is true: its commands, its code and its numbers."""

import re
from pathlib import Path

import pytest
from PIL import Image

import dpengine
from bench import report
from bench.report import figures

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_two_commands_are_on_the_first_screen():
    screen = README.splitlines()[:24]
    assert "    pip install -e . && python -m dpengine.finetune" in screen
    assert '    pip install -e ".[test]" && pytest -n auto' in screen


def test_continuous_integration_runs_the_two_commands_as_written():
    lines = (ROOT / ".ci" / "run").read_text(encoding="utf-8").splitlines()
    assert "pip install -e . && python -m dpengine.finetune" in lines
    assert 'pip install -e ".[test]" && pytest -n auto' in lines


@pytest.mark.parametrize("code", re.findall(r"```python\n(.*?)```", README, re.DOTALL))
def test_python_blocks_run(code):
    variables: dict = {}
    exec(compile(code, "README.md", "exec"), variables)
    # Each step updated the weights by noise and left nothing of the batch behind.
    assert variables["optimizer"].state is not None
    assert all(param.grad is None for param in variables["unet"].parameters())
    factors = [p for n, p in variables["unet"].named_parameters() if "lora_B" in n]
    assert all((factor != 0).any() for factor in factors)
    assert len(variables["engine"].accountant) == 9


@pytest.mark.parametrize("file", [report.README, report.PAGE], ids=lambda file: file.name)
def test_the_numbers_are_those_of_the_results(file):
    text = file.read_text(encoding="utf-8")
    assert text.count("<!-- begin ") >= 3
    assert report.filled(text, report.blocks(report.newest())) == text


DIFF = re.search(r"```diff\n(.*?)```", README, re.DOTALL)[1].splitlines()


def test_the_diff_names_what_there_is_and_prints_no_loss():
    added = "\n".join(line[1:] for line in DIFF if line.startswith("+"))
    names = set(re.findall(r"secure_\w+|PrivacyEngine|BatchMemoryManager", added))
    assert len(names) == 3 and names <= set(dir(dpengine))
    assert "loss" not in re.sub("#.*", "", added)
    removed = "\n".join(line for line in DIFF if line.startswith("-"))
    for private in ("train_loss", "step_loss", "torch.randn", "torch.randint", "set_seed"):
        assert private in removed


def test_no_line_of_a_loop_moves_by_the_diff():
    """What is kept stands as deep as in the original, below `with accelerator.accumulate`."""
    at = next(i for i, line in enumerate(DIFF) if "accumulate(unet)" in line)
    assert DIFF[at + 1] == "+    with nullcontext():"
    stay = [line[1:] for line in DIFF[at + 2 : -1] if line[0] != "-"]
    assert {len(line) - len(line.lstrip()) for line in stay} == {8}


def drawn_from(picture):
    found = report.newest()
    return report.of_quality(found) if picture == "quality" else found[picture]


@pytest.mark.parametrize("picture", ["growth", "steps", "quality"])
def test_the_plots_are_of_the_results(picture):
    with Image.open(report.FIGURES / f"{picture}.png") as image:
        assert image.text["Description"] == figures.made_from(drawn_from(picture))


@pytest.mark.parametrize("picture", ["growth", "steps", "quality", "samples"])
def test_the_pictures_are_there_and_shown(picture):
    file = report.FIGURES / f"{picture}.png"
    assert file.read_bytes()[1:4] == b"PNG"
    pages = README + report.PAGE.read_text(encoding="utf-8")
    assert f"figures/{file.name}" in pages


@pytest.mark.parametrize("link", re.findall(r"\]\(([^)#:]+)\)", README))
def test_links_lead_to_files(link):
    assert (ROOT / link).exists()
