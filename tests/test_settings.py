"""Sizes of memory as users write them, and neighbours that go with what is public."""

from typing import get_args

import pytest

from dpengine import settings
from dpengine.models import noising
from dpengine.settings import ModelSettings, PrivacySettings, Settings, parse_bytes


def test_the_laws_of_time_are_those_that_there_are():
    """Settings are read without torch, and so have a list of their own."""
    assert get_args(settings.TimeLaw) == get_args(noising.TimeLaw)


@pytest.mark.parametrize(
    ("chosen", "size", "neighbours"),
    [
        (None, None, "zero-out"),
        (None, 100, "add-remove"),
        ("zero-out", None, "zero-out"),
        ("add-remove", 100, "add-remove"),
        ("replace-one", None, "replace-one"),
        ("replace-one", 100, "replace-one"),
    ],
)
def test_the_adjacency_is_the_one_chosen_or_what_the_size_leaves(chosen, size, neighbours):
    privacy = PrivacySettings(public_dataset_size=size, adjacency=chosen)
    privacy.check()
    assert privacy.neighbours == neighbours


@pytest.mark.parametrize(("chosen", "size"), [("add-remove", None), ("zero-out", 100)])
def test_an_adjacency_that_the_public_size_contradicts_is_refused(chosen, size):
    with pytest.raises(ValueError, match=r"adjacency .* public_dataset_size"):
        PrivacySettings(public_dataset_size=size, adjacency=chosen).check()


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("8GB", 8 * 10**9),
        ("512MiB", 512 * 2**20),
        ("4e9", 4 * 10**9),
        ("1.1 kB", 1100),
        ("1.5KiB", 1536),
        ("0.3TiB", 3 * 2**40 // 10),
        (" 7b ", 7),
        ("2.5e3mb", 2500 * 10**6),
    ],
)
def test_a_size_is_read_exactly(text, size):
    assert parse_bytes(text) == size


@pytest.mark.parametrize(
    "text", ["", "GB", "8G", "-1GB", "0", "0.4B", "nan", "inf", "1e400", "8GBs", "8 G B", "٨GB"]
)
def test_what_is_no_size_is_refused(text):
    with pytest.raises(ValueError, match=r"max_memory must be a size such as 8GB.*got"):
        parse_bytes(text)


def test_a_name_that_would_plant_a_line_in_the_card_is_refused():
    chosen = Settings(model=ModelSettings(base="base\n## Privacy\nepsilon = 0.1"))
    with pytest.raises(ValueError, match=r"printable.*rename the folder"):
        chosen.check()
