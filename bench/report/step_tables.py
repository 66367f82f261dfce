"""Tables of training steps: peers, phases, memory, draws, growth and whole processes."""

from collections.abc import Mapping

from .tables import Content, Ratio, entries, markdown, spread


def peers(content: Content) -> str:
    """Every peer at the centre: time, operators, peak memory, largest batch, error of its sum."""
    centre = next(e for e in entries(content, "step") if e["case"] == "centre")
    memory = next(e for e in entries(content, "memory") if e["case"] == "centre")
    largest = entries(content, "largest_batch")[0]
    rows = []
    for peer, time in centre["over_non_private"].items():
        found = largest["peers"].get(peer)
        rows.append(
            [
                peer,
                spread(time),
                _cell(centre["ops"].get(peer), "{}"),
                _cell(memory["over_non_private"].get(peer), "{:.2f}"),
                "" if found is None else str(found["records"]),
                _cell(centre["verdicts"].get(peer, {}).get("error"), "{:.0e}"),
            ]
        )
    limit = f"largest batch in {largest['max_bytes'] / 2**20:.0f} MiB"
    header = ["", "time", "operators", "peak memory", limit, "error of the clipped sum"]
    return markdown(header, rows)


def sentence(content: Content) -> str:
    """README's words on speed."""
    centre = next(e for e in entries(content, "step") if e["case"] == "centre")
    modes = ("opacus hooks", "opacus ew", "opacus functorch", "opacus ghost")
    times = centre["over_non_private"]
    theirs = (f"`{name.split()[1]}` {spread(times[name])}" for name in modes if name in times)
    memory = next(e for e in entries(content, "memory") if e["case"] == "centre")
    ratios = [e["over_non_private"]["dpengine"] for e in entries(content, "step")]
    medians = sorted(ratio["median"] for ratio in ratios)
    return (
        f"A training step of a small UNet with LoRA ({centre['batch']} images of {centre['size']} "
        f"pixels a side, {content['device'].replace('-', ' ')}) takes {spread(times['dpengine'])} "
        f"times as long as without privacy, and "
        f"{memory['over_non_private']['dpengine']:.2f} times the memory beyond model, optimizer "
        f"and batch; Opacus' modes take {', '.join(theirs)} times as long. In brackets the "
        f"quartiles over rounds. Over the {len(medians)} cases that were measured (smaller batch, "
        "smaller images, other adapters) ours takes "
        f"{medians[0]:.2f} to {medians[-1]:.2f} of a non-private step. A step is forward and "
        "backward pass, clipping, noise and update; the ledger and the sampler are not in it."
    )


def not_timed(content: Content) -> str:
    """Peers that refused, were wrong, or were left out: a line each."""
    found = {}
    for entry in [*entries(content, "step"), *entries(content, "draws")]:
        for peer, verdict in entry["verdicts"].items():
            if reason := verdict.get("not_run"):
                found[f"- {peer}, {entry['case']}: {reason}"] = None
            elif verdict.get("wrong"):
                found[f"- {peer}, {entry['case']}: its sum is off by {verdict['error']:.0%}"] = None
    return "\n".join(found)


def cases(content: Content) -> str:
    """The step over the cases: ours over non-private, and Opacus over ours."""
    rows = [
        [
            entry["case"],
            spread(entry["over_non_private"]["dpengine"]),
            *(_of(entry["over_ours"], peer) for peer in ("opacus hooks", "opacus ew")),
        ]
        for entry in entries(content, "step")
    ]
    header = ["", "dpengine / non-private", "Opacus hooks / dpengine", "Opacus ew / dpengine"]
    return markdown(header, rows)


def phases(content: Content) -> str:
    """Phases of each peer's step, in units of the non-private step.

    What is compiled or recorded runs forward and backward pass as one, under `backward`.
    """
    names = ("forward", "backward", "clip", "noise", "optimizer")
    rows = []
    for entry in entries(content, "phases"):
        parts = dict(entry["over_non_private_step"])
        if (both := parts.pop("forward and backward", None)) is not None:
            parts["backward"] = both
        rows.append([entry["peer"], *(_spread(parts.get(name)) for name in names)])
    return markdown(["", *names], rows)


def memory(content: Content) -> str:
    """Peak above the non-private step, in the size of N float32 gradients."""
    found = entries(content, "memory")
    names = [peer for peer in found[0]["above_non_private"] if peer != "non-private"]
    rows = [
        [
            f"{entry['case']} (N = {entry['batch']}, P = {entry['parameters']:,})",
            *(_cell(entry["above_non_private"].get(peer), "{:.2f}") for peer in names),
        ]
        for entry in found
    ]
    return markdown(["", *names], rows)


def draws(content: Content) -> str:
    """K draws of each image, ours and what a user of Opacus writes."""
    rows = []
    for entry in entries(content, "draws"):
        moved, peaks = entry["moved_by_one_record_in_C"], entry["memory"]["over_non_private"]
        rows += [
            [
                f"{peer}, K = {entry['draws']}",
                spread(time),
                _cell(peaks.get(peer), "{:.2f}"),
                _cell(moved.get(peer, {}).get("aligned"), "{:.2f} C"),
            ]
            for peer, time in entry["over_non_private"].items()
        ]
    return markdown(["", "time", "peak memory", "one record moves the sum by"], rows)


def draws_privacy(content: Content) -> str:
    """What clipping each draw by itself does to a claim."""
    entry = next(e for e in entries(content, "draws_privacy") if e["draws"] == 4)
    plan = entry["plan"]
    return (
        f"With K = {entry['draws']} draws taken for records, at a sampling rate of "
        f"{plan['sampling_rate']:g}, noise multiplier {plan['noise_multiplier']:g}, "
        f"{plan['num_steps']:,} steps and δ = {plan['delta']:g}, a claim of "
        f"ε = {entry['epsilon']:.2f} is one of {entry['epsilon_of_draws_as_records']:.0f} in the "
        "worst case."
    )


def growth(content: Content) -> str:
    """What privacy adds over each quantity, counted; and the line through our step's times."""
    rows = []
    for entry in entries(content, "growth"):
        values, added = entry["values"], entry["privacy_adds"]
        ratios = entry["ours_over_non_private"]
        rows.append(
            [
                f"{entry['axis']}: {', '.join(map(str, values))}",
                " / ".join(map(spread, ratios)),
                f"{entry['steps']['dpengine']['time']['line']['misses']:.1%}",
                f"{entry['steps']['non-private']['time']['line']['misses']:.1%}",
                " / ".join(f"{count:+,}" for count in added["ops"]["counts"]),
                " / ".join(f"{count / 2**20:+.2f}" for count in added["peak_bytes"]["counts"]),
            ]
        )
    header = [
        *("", "time, dpengine / non-private", "line misses", "line misses, non-private"),
        *("operators added", "MiB added"),
    ]
    return f"{markdown(header, rows)}\n\n{_rising(content)}"


def _rising(content: Content) -> str:
    """The quantities over which ours takes ever more of the non-private step."""
    rising = []
    for entry in entries(content, "growth"):
        first, *_, last = entry["ours_over_non_private"]
        if last["quartile_1"] > first["quartile_3"]:
            rising.append(f"{entry['axis']} (from {first['median']:.2f} to {last['median']:.2f})")
    if not rising:
        return "Over none of them does ours take an ever larger share, beyond the spread."
    return f"The share of ours rises beyond the spread with: {', '.join(rising)}."


def processes(content: Content) -> str:
    """Records a second on two processes, over those on one."""
    rows = [
        [str(entry["records"]), spread(entry["throughput_over_one_process"])]
        for entry in entries(content, "processes")
    ]
    return markdown(["records in a batch", "records/s, 2 processes / 1"], rows)


def product(content: Content) -> str:
    """The command beside a script of Opacus, whole processes."""
    rows = []
    titles = {
        "whole": "whole process, time",
        "step": "a step, from the difference of two lengths",
        "besides": "start-up and results",
        "memory": "peak host memory of the process",
    }
    for section, title in titles.items():
        for entry in entries(content, section):
            rows.append([f"{title}: {entry['peer']}", spread(entry["ratio"])])
    steps = entries(content, "whole")[0]["num_steps"]
    return markdown([f"job of {steps} steps", "Opacus script / dpengine"], rows)


def product_quality(content: Content) -> str:
    """What both sides claim, and how good their images are."""
    rows = [
        [
            entry["side"],
            f"{entry['epsilon']:.3f}",
            f"{entry['noise_multiplier']:.3f}",
            ", ".join(f"{accuracy:.3f}" for accuracy in entry["accuracy"]),
        ]
        for entry in entries(content, "quality")
    ]
    return markdown(["", "ε claimed", "noise multiplier", "accuracy"], rows)


def _of(ratios: Mapping[str, Ratio], peer: str) -> str:
    return spread(ratios[peer]) if peer in ratios else ""


def _spread(ratio: Ratio | None) -> str:
    return "" if ratio is None else spread(ratio)


def _cell(value: float | None, form: str) -> str:
    return "" if value is None else form.format(value)
