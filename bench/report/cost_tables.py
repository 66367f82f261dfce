"""Tables of single operations, of accountants and of noise."""

from ..turns import ratio
from .tables import Content, entries, markdown, spread


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
    """Each accountant over all settings; then what a target of ε gets.

    How far a claim is above ε is counted from the lower end of the interval that holds ε.
    """
    found = entries(content, "epsilon")
    names = dict.fromkeys(name for e in found for name in (*e["claims"], *e["refused"]))
    header = [
        "",
        "time / dpengine",
        "above ε by at most",
        "of ε",
        "no bound",
        "refused",
        "settings",
    ]
    tables = [markdown(header, [[name, *_accountant(found, name)] for name in names])]
    if targets := entries(content, "calibration"):
        header = ["target", "time, Opacus / dpengine"]
        header += [f"{of}, {name}" for of in ("σ", "ε spent") for name in ("dpengine", "Opacus")]
        tables.append(markdown(header, map(_target, targets)))
    return "\n\n".join(tables)


def _accountant(found: list[Content], name: str) -> list[str]:
    asked = [e for e in found if name in e["claims"] or name in e["refused"]]
    refused = sum(name in e["refused"] for e in asked)
    answered = [e for e in asked if name in e["claims"]]
    counts = [str(refused), str(len(asked))]
    if not answered:
        return ["", "", "", "", *counts]
    times = [e["over_ours"][name]["median"] for e in answered]
    above = [(e["claims"][name] - e["reference"]["low"], e["reference"]["low"]) for e in answered]
    return [
        spread(ratio(times, [1.0] * len(times))),
        f"{max(excess for excess, _ in above):.2g}",
        f"{100 * max(excess / epsilon for excess, epsilon in above):.3g} %",
        str(sum(not e["bound"][name] for e in answered)),
        *counts,
    ]


def _target(entry: Content) -> list[str]:
    noise, spent = [], []
    for name in ("dpengine", "Opacus"):
        if name in entry["refused"]:
            noise.append("refused")
            spent.append("")
        else:
            noise.append(f"{entry['noise_multiplier'][name]:.4f}")
            too_much = "" if entry["keeps"][name] else ", too much"
            spent.append(f"{entry['spent'][name]['high']:.4f}{too_much}")
    time = entry["over_ours"].get("Opacus")
    return [entry["target"], "" if time is None else spread(time), *noise, *spent]


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


def threads(content: Content) -> str:
    """Each way that threads wait: its time over ours, and draws a second, beside each load."""
    found = entries(content, "threads")
    rows = [
        [
            way,
            *(
                f"{spread(entry['over_ours'][way])}, {entry['draws_per_second'][way]:.0f} draws/s"
                for entry in found
            ),
        ]
        for way in found[0]["over_ours"]
    ]
    return markdown(["", *(entry["load"] for entry in found)], rows)
