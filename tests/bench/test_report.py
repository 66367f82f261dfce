"""Documents are filled from files: the newest of each suite, and nothing without its file."""

import json

import pytest
from PIL import Image

from bench import report, results
from bench.report import cost_tables, figures, quality_tables, step_tables, tables


def ratio(median, low=None, high=None, rounds=7):
    low, high = median if low is None else low, median if high is None else high
    quartiles = {"median": median, "quartile_1": low, "quartile_3": high}
    return quartiles | {"least": low - 0.5, "most": high + 0.5, "of_fastest": 1, "rounds": rounds}


def keep(folder, suite, device, date, **content):
    about = {"device": device, "date": date} | content
    full = "-full" if content.get("full") else ""
    (folder / f"{suite}{full}-{device}-{date}.json").write_text(json.dumps(about))


def cells(table, row):
    """The cells of the row that begins so."""
    (line,) = [line for line in table.splitlines() if line.startswith(f"| {row} |")]
    return [cell.strip() for cell in line.strip("|").split("|")][1:]


def test_the_newest_file_of_a_device_counts(tmp_path):
    keep(tmp_path, "noise", "cpu-2-cores", "2026-11-02", results="old")
    keep(tmp_path, "noise", "cpu-2-cores", "2026-11-10", results="new")
    keep(tmp_path, "noise", "cpu-2-cores", "2026-11-10", full=True, results="full")
    keep(tmp_path, "noise", "cpu-2-cores", "2026-11-09", full=True, results="older, full")
    assert results.newest("noise", tmp_path)["cpu-2-cores"]["results"] == "full"
    assert report.newest(tmp_path) == {"noise": results.newest("noise", tmp_path)["cpu-2-cores"]}


def test_a_gpu_is_shown_where_one_was_measured(tmp_path):
    keep(tmp_path, "growth", "nvidia-h200", "2026-11-02", results="gpu")
    keep(tmp_path, "growth", "cpu-2-cores", "2026-11-10", results="cpu")
    assert report.newest(tmp_path)["growth"]["results"] == "gpu"
    keep(tmp_path, "growth", "nvidia-h100", "2026-11-05", results="newer gpu")
    keep(tmp_path, "growth", "cpu-16-cores", "2026-12-10", results="other cpu")
    assert report.newest(tmp_path)["growth"]["results"] == "newer gpu"


def test_whether_a_gpu_was_measured_is_told():
    cpu, gpu = {"device": "cpu-2-cores"}, {"device": "nvidia-h200"}
    assert report.devices({"steps": cpu}).endswith("cpu 2 cores. No GPU was measured yet.")
    assert report.devices({"steps": cpu, "noise": gpu}).endswith("cpu 2 cores, nvidia h200.")


def test_minutes_of_the_suites_are_told():
    found = {
        "steps": {"seconds": 150.0},
        "growth": {"seconds": 90.0, "full": True},
        "quality-digits": {},
    }
    told = report.durations(found)
    assert told == (
        "The suites took 4.0 minutes of that machine: steps 2.5, growth 1.5. With `--full`: growth."
    )


@pytest.mark.parametrize("dirty", [False, True])
def test_numbers_come_with_the_code_that_made_them(dirty):
    about = {"device": "cpu-2-cores", "threads": 2, "versions": {"torch": "2.13.0"}}
    about |= {"date": "2026-11-28", "commit": 40 * "f" + "-dirty" * dirty}
    told = report.provenance(about)
    assert f"2026-11-28, {9 * 'f'}{' with changes' * dirty}</sub>" in told


def test_what_stands_between_the_marks_is_replaced_and_the_rest_stays():
    text = "a\n<!-- begin one -->\nold\n<!-- end one -->\nb\n<!-- begin two --><!-- end two -->c\n"
    found = report.filled(text, {"one": "1", "two": "2", "three": "3"})
    expected = "a\n<!-- begin one -->\n1\n<!-- end one -->\nb\n<!-- begin two -->\n2\n"
    assert found == expected + "<!-- end two -->c\n"
    assert report.filled(found, {"one": "1", "two": "2"}) == found


def test_a_mark_without_results_is_an_error():
    with pytest.raises(ValueError, match="'one'"):
        report.filled("<!-- begin one -->\n1\n<!-- end one -->", {})
    with pytest.raises(ValueError, match="must have its"):
        report.filled("<!-- begin one -->\n1\n", {"one": "1"})


def test_results_are_written_at_once_under_suite_device_and_day(tmp_path):
    file = results.write("noise", {"full": True, "results": {}}, tmp_path)
    about = json.loads(file.read_text())
    assert file.name == f"noise-full-{about['device']}-{about['date']}.json"
    assert [entry.name for entry in tmp_path.iterdir()] == [file.name]
    assert about["versions"]["torch"] and len(about["commit"].removesuffix("-dirty")) == 40


STEPS = {
    "device": "cpu-2-cores",
    "results": {
        "step": [
            {
                "case": "centre",
                "batch": 16,
                "size": 16,
                "over_non_private": {
                    "non-private": ratio(1.0),
                    "dpengine": ratio(1.04, 1.01, 1.1),
                    "opacus hooks": ratio(1.25),
                    "opacus ew": ratio(1.5),
                    "opacus ghost": ratio(4.0),
                },
                "over_ours": {"opacus hooks": ratio(1.2), "opacus ew": ratio(1.44)},
                "images_per_s": {"non-private": 100.0, "dpengine": 96.0},
                "ops": {"non-private": 770, "dpengine": 709},
                "verdicts": {"dpengine": {"error": 2e-7}, "inductor": {"not_run": "too slow"}},
            }
        ],
        "memory": [
            {
                "case": "centre",
                "batch": 16,
                "parameters": 1000,
                "over_non_private": {"non-private": 1.0, "dpengine": 1.02},
                "above_non_private": {"non-private": 0.0, "dpengine": 1.09},
            }
        ],
        "largest_batch": [
            {"max_bytes": 2**27, "peers": {"non-private": {"records": 50}}},
        ],
        "draws": [
            {
                "case": "4 draws",
                "draws": 4,
                "verdicts": {"by hand": {"error": 0.5, "wrong": True}},
                "over_non_private": {"non-private": ratio(1.0), "as records": ratio(1.3)},
                "moved_by_one_record_in_C": {"as records": {"aligned": 3.9999, "random": 2}},
                "memory": {"over_non_private": {"as records": 1.5}},
            }
        ],
    },
}


def test_a_step_is_shown_with_its_spread_and_what_was_not_measured_is_left_blank():
    table = step_tables.peers(STEPS)
    assert cells(table, "dpengine") == ["1.04 (1.01–1.10)", "709", "1.02", "", "2e-07"]
    assert cells(table, "non-private")[3] == "50"
    assert "128 MiB" in table.splitlines()[0]
    assert cells(step_tables.draws(STEPS), "as records, K = 4") == [
        "1.30 (1.30–1.30)",
        "1.50",
        "4.00 C",
    ]


def test_few_rounds_are_shown_with_their_range():
    assert tables.spread(ratio(2.0, 1.5, 3.0)) == "2.00 (1.50–3.00)"
    assert tables.spread(ratio(2.0, 1.5, 3.0, rounds=4)) == "2.00 (1.00–3.50)"


def test_readmes_sentence_on_speed_is_of_the_centre():
    sentence = step_tables.sentence(STEPS)
    assert "16 images of 16 pixels" in sentence
    assert "takes 1.04 (1.01–1.10) times as long as without privacy, and 1.02 times" in sentence
    assert "`hooks` 1.25 (1.25–1.25), `ew` 1.50 (1.50–1.50), `ghost` 4.00" in sentence
    assert "functorch" not in sentence  # it did not run


def test_readmes_sentence_tells_the_whole_range():
    other = STEPS["results"]["step"][0] | {
        "case": "batch 4",
        "over_non_private": {"non-private": ratio(1.0), "dpengine": ratio(1.29)},
    }
    found = STEPS["results"] | {"step": [*STEPS["results"]["step"], other]}
    sentence = step_tables.sentence(STEPS | {"results": found})
    assert "Over the 2 cases" in sentence and "takes 1.04 to 1.29 of a non-private" in sentence


@pytest.mark.parametrize(("low", "told"), [(1.21, "N (from 1.10 to 1.25)"), (1.11, "none")])
def test_what_grows_beyond_the_spread_is_named(low, told):
    ratios = [ratio(1.1, 1.0, 1.2), ratio(1.15), ratio(1.25, low, 1.3)]
    line = {"time": {"line": {"misses": 0.01}}}
    entry = {
        **{"axis": "N", "values": [1, 2, 4], "ours_over_non_private": ratios},
        "steps": {"dpengine": line, "non-private": line},
        "privacy_adds": {"ops": {"counts": [1, 2, 3]}, "peak_bytes": {"counts": [0, 0, 2**20]}},
    }
    table = step_tables.growth({"results": {"growth": [entry]}})
    assert told in table.splitlines()[-1]
    assert "1.10 (1.00–1.20) / 1.15" in cells(table, "N: 1, 2, 4")[0]


def test_who_was_not_timed_is_told_with_the_reason():
    lines = step_tables.not_timed(STEPS).splitlines()
    assert lines == ["- inductor, centre: too slow", "- by hand, 4 draws: its sum is off by 50%"]


def test_an_operation_is_shown_beside_opacus_and_one_that_was_wrong_is_named():
    entry = {
        **{"op": "lora_side_a", "shape": "digits", "bytes": 2**20, "flops": 4_200_000},
        **{"over_ours": {"opacus": ratio(1.5)}, "bound_by": "bytes", "verdicts": {}},
        "share_of_roofline": {"dpengine": ratio(0.31)},
    }
    wrong = entry | {"shape": "big", "over_ours": {}, "verdicts": {"opacus": {"wrong": True}}}
    table = cost_tables.kernels({"results": {"ops": [entry, wrong]}})
    row = cells(table, "`lora_side_a`, digits")
    assert row == ["1.50 (1.50–1.50)", "1.00", "4.2", "31%", "bytes"]
    assert cells(table, "`lora_side_a`, big")[0] == "wrong"
    assert "eager" not in table


def test_noise_is_shown_over_torch_randn():
    entry = {
        **{"model": "digits", "values": 5888, "over_randn": {"dpengine": ratio(7.0, 6.0, 8.0)}},
        "gb_per_s": {"dpengine": 0.1234},
    }
    table = cost_tables.noise({"results": {"noise": [entry]}})
    assert cells(table, "dpengine") == ["7.00 (6.00–8.00), 0.12 GB/s"]
    assert "5,888 values (digits)" in table


def quality_run(epsilon, svc, cnn, distance):
    return {"epsilon": epsilon, "svc": svc, "cnn": cnn, "frechet_glyphs": distance}


QUALITY = {
    "settings": {"output": {"num_synthetic": 2000}, "privacy": {"delta": 1e-4}},
    "num_train": 1437,
    "num_test": 360,
    "num_compared": 360,
    "base": [quality_run(None, 0.6, 0.5, 9.0)],
    "image_size": 8,
    "real": {"svc": 0.99, "cnn": 0.98, "frechet_glyphs": 0.25},
    "real_as_many": {"svc": 0.97, "cnn": 0.96},
    "date": "2026-11-28",
    "device": "cpu-2-cores",
    "runs": [
        quality_run("inf", 0.95, 0.94, 1.0),
        quality_run(10.0, 0.9, 0.8, 2.0),
        quality_run(10.0, 0.92, 0.86, 3.0),
        quality_run(1.0, 0.7, 0.6, 5.0),
    ],
}


def test_quality_is_the_mean_of_runs_and_half_of_their_distance():
    table = quality_tables.quality({"digits": QUALITY})
    assert cells(table, "ε = 10") == ["91.0 ± 1.0", "83.0 ± 3.0", "2.50 ± 0.50"]
    assert cells(table, "all real images") == ["99.0", "98.0", "0.25"]
    assert cells(table, "as many real images") == ["97.0", "96.0", ""]
    order = [line.split("|")[1].strip() for line in table.splitlines()[2:]]
    names = ["base model", "ε = 1", "ε = 10", "no noise (ε = ∞)", "as many real images"]
    assert order == [*names, "all real images"]


def test_an_epsilon_that_one_data_set_lacks_is_blank():
    other = QUALITY | {"runs": [quality_run(3.0, 0.5, 0.5, 4.0)]}
    table = quality_tables.quality({"digits": QUALITY, "mnist": other})
    assert cells(table, "ε = 3") == ["", "", "", "50.0", "50.0", "4.00"]


def test_published_numbers_stand_below_ours_and_what_was_not_run_is_told():
    table = quality_tables.published(QUALITY | {"runs": QUALITY["runs"][:3]})
    assert cells(table, "dpengine, 8 x 8 px, SVC") == ["not run", "91.0 ± 1.0"]
    # DPImageBench, README section 7.
    assert cells(table, "DP-LoRA") == ["82.2", "97.1"]
    assert cells(table, "DP-FETA") == ["95.6", "98.1"]
    assert table.endswith("91.0 is not above the 98.1 of DP-FETA at ε = 10.")
    assert "ε = 1;" not in table  # of which there is no run


def test_whether_the_aim_was_reached_is_told_for_the_better_classifier():
    told = quality_tables.aims(QUALITY | {"runs": [quality_run(1.0, 0.5, 0.9, 1.0)]})
    assert "90.0 is above the 82.2 of DP-LoRA at ε = 1; 90.0 is not above the 95.6" in told


def test_what_was_run_is_told_with_its_numbers():
    told = quality_tables.quality_about("digits", QUALITY)
    assert "8 x 8 pixels" in told
    assert "1,437 private images, 360 held out" in told and "2,000 synthetic images" in told
    assert "δ = 0.0001, 1 to 2 runs at each ε (2026-11-28, cpu 2 cores)" in told


def test_phases_and_accuracies_are_drawn(tmp_path):
    eager = {"forward": ratio(0.4), "backward": ratio(0.6), "optimizer": ratio(0.1)}
    recorded = {"forward and backward": ratio(0.7), "clip": ratio(0.1), "noise": ratio(0.05)}
    entries = [
        {"peer": "eager", "case": "centre", "over_non_private_step": eager},
        {"peer": "recorded", "case": "centre", "over_non_private_step": recorded},
    ]
    wholes = {"eager": ratio(1.1), "recorded": ratio(1.7)}
    steps = {"phases": entries, "step": [{"case": "centre", "over_non_private": wholes}]}
    table = step_tables.phases({"results": {"phases": entries}})
    assert cells(table, "recorded")[:3] == ["", "0.70 (0.70–0.70)", "0.10 (0.10–0.10)"]
    assert figures._phase(recorded, "backward") == recorded["forward and backward"]
    scales = [figures._scale(entry, wholes) for entry in entries]
    assert scales == pytest.approx([1.0, 2.0])  # a bar is as long as the whole step of the tables
    figures.steps({"results": steps}, tmp_path / "steps.png")
    figures.quality({"digits": QUALITY}, tmp_path / "quality.png")
    drawn = {"steps": {"results": steps}, "quality": {"digits": QUALITY}}
    for name, content in drawn.items():
        with Image.open(tmp_path / f"{name}.png") as image:
            assert image.text["Description"] == figures.made_from(content)
    assert figures.made_from({"digits": QUALITY}) != figures.made_from({"mnist": QUALITY})


def test_documents_and_pictures_are_made_by_one_command(tmp_path, monkeypatch):
    monkeypatch.setattr(report, "newest", lambda: {"quality-digits": QUALITY})
    page = tmp_path / "page.md"
    page.write_text("<!-- begin quality -->\n<!-- end quality -->\n")
    monkeypatch.setattr(report, "README", page)
    monkeypatch.setattr(report, "PAGE", page)
    monkeypatch.setattr(report, "FIGURES", tmp_path / "figures")
    report.main()
    assert "91.0 ± 1.0" in page.read_text()
    assert [file.name for file in (tmp_path / "figures").iterdir()] == ["quality.png"]
