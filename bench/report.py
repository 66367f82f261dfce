"""README's numbers, docs/benchmarks.md and the plots, from the files in results/ alone.

python -m bench.report

Of each suite and device the newest file counts. What no file holds is left out, and said to be.
"""

from .results import ROOT

README = ROOT / "README.md"
BENCHMARKS = ROOT / "docs" / "benchmarks.md"
FIGURES = ROOT / "docs" / "figures"
