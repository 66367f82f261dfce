"""Tables of single operations, of accountants and of noise."""

from .step_tables import entries, spread
from .tables import Content, markdown


def kernels(content: Content) -> str:
    """Each op: the others over ours, what it moves and computes, and its share of the roofline."""
    found = entries(content, "ops")
    eager = any("eager" in entry["over_ours"] for entry in found)  # on a GPU, beside the kernels
    peers = {"opacus": "Opacus / dpengine"} | ({"eager": "eager / dpengine"} if eager else {})
    rows = [
        [
            f"`{entry['op']}`, {entry['shape']}",
            *(_over(entry, peer) for peer in peers),
            f"{entry['bytes'] / 2**20:.2f}",
            f"{entry['flops'] / 1e6:.1f}",
            f"{entry['share_of_roofline']['dpengine']['median']:.0%}",
            entry["bound_by"],
        ]
        for entry in found
    ]
    header = ["op, layer", *peers.values(), "MiB", "MFLOP", "share of the roofline", "bound by"]
    return markdown(header, rows)


def _over(entry: Content, peer: str) -> str:
    if peer in entry["over_ours"]:
        return spread(entry["over_ours"][peer])
    return "wrong" if "wrong" in entry["verdicts"].get(peer, {}) else ""


def accounting(content: Content) -> str:
    raise NotImplementedError


def noise(content: Content) -> str:
    """Each source of normals: time over `torch.randn`, and gigabytes a second of what it makes."""
    found = entries(content, "noise")
    rows = [
        [
            peer,
            *(
                f"{spread(entry['over_randn'][peer])}, {entry['gb_per_s'][peer]:.2f} GB/s"
                for entry in found
            ),
        ]
        for peer in found[0]["over_randn"]
    ]
    return markdown(["", *(f"{e['values']:,} values ({e['model']})" for e in found)], rows)
