"""The README is true: its commands, its code and its numbers."""

import json
import re
from pathlib import Path

import pytest

from bench import quality

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_two_commands_are_on_the_first_screen():
    screen = README.splitlines()[:24]
    assert "    pip install -e . && python -m dpengine.finetune" in screen
    assert '    pip install -e ".[test]" && pytest' in screen


def test_continuous_integration_runs_the_two_commands_as_written():
    lines = (ROOT / ".ci" / "run").read_text(encoding="utf-8").splitlines()
    assert "pip install -e . && python -m dpengine.finetune" in lines
    assert 'pip install -e ".[test]" && pytest' in lines


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


def test_the_table_is_made_from_the_results():
    shown = README.split(quality.BEGIN)[1].split(quality.END)[0].strip()
    assert shown == quality.table(json.loads(quality.RESULTS.read_text()))


@pytest.mark.parametrize("link", re.findall(r"\]\(([^)#:]+)\)", README))
def test_links_lead_to_files(link):
    assert (ROOT / link).exists()
