"""Tables of single operations, of accountants and of noise."""

from .step_tables import entries, spread
from .tables import Content, markdown


def kernels(content: Content) -> str:
    """Each op: Opacus' formula over ours, what it moves and computes, its share of the roofline."""
    rows = [
        [
            f"{entry['op']}, {entry['shape']}",
            spread(entry["over_auto"]["opacus"]) if "opacus" in entry["over_auto"] else "wrong",
            f"{entry['bytes'] / 2**20:.2f}",
            f"{entry['flops'] / 1e6:.1f}",
            f"{entry['share_of_roofline']['auto']['median']:.0%}",
            entry["bound_by"],
        ]
        for entry in entries(content, "ops")
    ]
    header = ["op, layer", "Opacus / dpengine", "MiB", "MFLOP", "share of the roofline", "bound by"]
    return markdown(header, rows)


def accounting(content: Content) -> str:
    raise NotImplementedError


def noise(content: Content) -> str:
    raise NotImplementedError
