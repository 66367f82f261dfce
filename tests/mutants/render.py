"""Writes the table of planted bugs into the documentation: `python -m tests.mutants.render`."""

from pathlib import Path

from tests.mutants.mutants import MUTANTS

PAGE = Path(__file__).parent.parent.parent / "docs" / "privacy.md"
BEGIN, END = "<!-- mutants -->\n", "<!-- /mutants -->"


def table() -> str:
    """The list in Markdown."""
    lines = ["| planted bug | in | found by |", "|---|---|---|"]
    for mutant in MUTANTS:
        file, _, test = mutant.test.partition("::")
        where = f"`{mutant.file}`"
        found = f"`{file.removeprefix('tests/')}` `{test.split('[')[0]}`"
        lines.append(f"| {mutant.bug} | {where} | {found} |")
    return "\n".join(lines) + "\n"


def table_of(page: str) -> str:
    """What stands between the marks of ``page``."""
    return page.partition(BEGIN)[2].partition(END)[0]


def main() -> None:
    """Put the table in the page, in place of the one that is there."""
    before, mark, rest = PAGE.read_text(encoding="utf-8").partition(BEGIN)
    if not mark or END not in rest:
        raise SystemExit(f"{PAGE} must hold the lines {BEGIN.strip()} and {END}")
    PAGE.write_text(before + BEGIN + table() + END + rest.partition(END)[2], encoding="utf-8")
    print(f"{len(MUTANTS)} planted bugs in {PAGE}")


if __name__ == "__main__":
    main()
