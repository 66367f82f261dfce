"""What a planted bug is."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Mutant:
    """One edit of the sources that breaks privacy, and the test that must fail for it.

    bug: what it does, or the real bug that it stands for. file: from the root of the repository.
    old, new: the edit; ``old`` occurs once in the file. test: a pytest node id.
    """

    name: str
    bug: str
    file: str
    old: str
    new: str
    test: str
