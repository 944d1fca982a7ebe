"""From a result folder to the page's data, without a browser."""

import base64
import json
import re
import shutil

import numpy as np
import pytest

from svg.cli import main
from svg.eval.files import write_json
from svg.eval.page import build_page
from svg.eval.page.build import load_page_data, render
from svg.eval.page.remarks import remarks


def embedded(text):
    """The data as a browser would read it from the page."""
    return json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', text, re.DOTALL)[1])


def copy(folder, target, change):
    shutil.copytree(folder, target)
    (path,) = (path for name in ("sweep.json", "report.json") if (path := target / name).exists())
    content = json.loads(path.read_text())
    change(content)
    write_json(path, content)
    return target


def test_page_holds_what_was_measured(sweep_folder):
    content = json.loads((sweep_folder / "sweep.json").read_text())
    data = embedded(build_page(sweep_folder).read_text())
    assert [item["id"] for item in data["cells"]] == [item["id"] for item in content["cells"]]
    for shown, item in zip(data["cells"], content["cells"]):
        assert (shown["prompt"], shown["command"]) == (item["generation"]["prompt"], item["reproduce"])
        assert shown["status"] == item["status"]
        if item["status"] == "finished":
            assert shown["seconds"] == item["seconds"] and shown["density"] == item["density"]
        if item.get("quality"):
            means = {name: item["quality"].get(name, {}).get("mean") for name in shown["quality"]}
            assert shown["quality"] == means


def test_hostile_texts_stay_texts(sweep_folder):
    text = build_page(sweep_folder).read_text()
    data = text.split('id="data">')[1].split("</script>")[0]
    assert not set("<>&\u2028") & set(data)
    assert "<b>markup" not in text and "onerror=alert" not in text.split('id="data">')[0]
    assert text.count("<script") == 1 + text.count("<script>")


def test_title_is_escaped(run_folder, tmp_path):
    def rename(report):
        report["generation"]["prompt"] = "</title><script>1</script>"

    text = render(load_page_data(copy(run_folder, tmp_path / "run", rename)))
    assert "<title>&lt;/title&gt;&lt;script&gt;1&lt;/script&gt;</title>" in text


def test_run_as_cells(run_folder):
    data = load_page_data(run_folder)
    assert [(item["role"], item["reference"], item["control"]) for item in data["cells"]] == [
        ("dense", None, "control"),
        ("accelerated", "dense", "control"),
        ("control", "dense", None),
    ]
    assert [item["video"] for item in data["cells"]] == ["dense.mp4", "accelerated.mp4", None]
    assert data["cells"][1]["label"] == "svg1 density=0.3"
    assert any("no speed-up is expected" in note for note in data["notes"])


def test_maps_survive_packing(run_folder):
    report = json.loads((run_folder / "report.json").read_text())
    part = report["runs"]["accelerated"]["transformers"]["transformer"]
    (shown,) = load_page_data(run_folder)["cells"][1]["maps"]
    shape = len(shown["steps"]), len(shown["layers"]), shown["heads"]
    density = np.frombuffer(base64.b64decode(shown["density"]), np.uint8).reshape(shape)
    assert np.allclose(density / 254, part["density"]["map"]["values"], atol=0.5 / 254 + 1e-9)
    kinds = np.frombuffer(base64.b64decode(shown["temporal"]), np.uint8).reshape(shape)
    assert (kinds[0] == 255).all()  # the first step was dense: it has no kinds
    assert np.allclose(kinds[1:] / 254, part["head_kinds_map"]["values"], atol=0.5 / 254 + 1e-9)


def test_more_than_all_is_shown_as_all(run_folder, tmp_path):
    """A head of near that lists every granule computes the means besides."""

    def more(report):
        report["runs"]["accelerated"]["transformers"]["transformer"]["density"]["map"]["values"][2][1][0] = 1.0625

    (shown,) = load_page_data(copy(run_folder, tmp_path / "run", more))["cells"][1]["maps"]
    density = np.frombuffer(base64.b64decode(shown["density"]), np.uint8).reshape(4, 3, 2)
    assert density[2, 1, 0] == 254


def test_layer_without_a_call(run_folder, tmp_path):
    def drop(report):
        report["runs"]["accelerated"]["transformers"]["transformer"]["density"]["map"]["values"][2][1] = None

    (shown,) = load_page_data(copy(run_folder, tmp_path / "run", drop))["cells"][1]["maps"]
    density = np.frombuffer(base64.b64decode(shown["density"]), np.uint8).reshape(4, 3, 2)
    assert (density[2, 1] == 255).all() and (density != 255).sum() == density.size - 2


def test_infinite_quality_and_missing_video(run_folder, tmp_path):
    def identical(report):
        report["quality"]["control"]["psnr"] = {"mean": float("inf"), "per_frame": [float("inf")] * 9}

    folder = copy(run_folder, tmp_path / "run", identical)
    (folder / "accelerated.mp4").unlink()
    _, accelerated, control = load_page_data(folder)["cells"]
    assert control["quality"]["psnr"] == "inf" and accelerated["video"] is None


def test_running_sweep_says_so(sweep_folder, tmp_path):
    def pending(sweep):
        kept = ("id", "role", "label", "model", "method", "generation", "run", "reference", "control", "reproduce")
        sweep["cells"][4] = {**{key: sweep["cells"][4][key] for key in kept}, "status": "pending"}
        sweep["state"], sweep["counts"]["pending"] = "running", 1

    data = load_page_data(copy(sweep_folder, tmp_path / "sweep", pending))
    assert data["state"] == "running" and data["cells"][4]["status"] == "pending"
    assert len({item["group"] for item in data["cells"]}) == 1
    notes = "\n".join(data["notes"])
    assert "still to come" in notes and "1 of 21 cells failed" in notes


@pytest.mark.parametrize(
    "name, text, words",
    [
        (None, None, ["report.json", "sweep.json"]),
        ("report.json", "{", ["report.json", "JSON"]),
        ("report.json", '{"runs": {}}', ["report.json", "this version"]),
        ("sweep.json", '{"format": "svg-sweep", "version": 9}', ["version 1", "version 9"]),
    ],
)
def test_bad_folders(tmp_path, capsys, name, text, words):
    if name:
        (tmp_path / name).write_text(text)
    assert main(["page", str(tmp_path)]) == 2
    line = capsys.readouterr().err.strip()
    assert "\n" not in line and all(word in line for word in words), line
    assert not (tmp_path / "report.html").exists()


def test_missing_folder(tmp_path, capsys):
    assert main(["page", str(tmp_path / "nowhere")]) == 2
    assert "no folder at" in capsys.readouterr().err


def test_plots(sweep_folder, tmp_path, capsys):
    folder = copy(sweep_folder, tmp_path / "sweep", lambda content: None)
    assert main(["page", str(folder), "--plots", "--metric", "lpips"]) == 0
    assert (folder / "pareto.png").read_bytes().startswith(b"\x89PNG")
    assert "<svg" in (folder / "pareto.svg").read_text()
    assert main(["page", str(folder), "--plots", "--metric", "psnr2"]) == 2
    assert "metric must be one of psnr" in capsys.readouterr().err


def sparse_cell(label, density, seconds, settings, group="a"):
    return {
        **{"id": label + group, "role": "accelerated", "status": "finished", "label": label, "group": group},
        **{
            "method": "near",
            "settings": settings,
            "density": {"all_calls": density},
            "seconds": {"attention": seconds},
        },
        **{"device_type": "cuda", "reference": "dense", "prompt": "a", "seed": 0},
    }


def dense_cell(seconds):
    return {**sparse_cell("dense", 1.0, seconds, {}), "id": "dense", "role": "dense", "method": "dense"}


def test_a_launch_bound_model_is_said():
    def notes(dense, few, many, **change):
        cells = [
            sparse_cell("near budget=0.2", 0.2, few, {"budget": 0.2}),
            sparse_cell("near budget=0.4", 0.4, many, {"budget": 0.4}),
        ]
        return list(remarks([dense_cell(dense), *({**one, **change} for one in cells)], ("budget",)))

    (note,) = notes(2.0, 0.95, 1.0)
    assert "launch-bound: attention of near takes 0.95 s at density 0.20 and 1 s at 0.40" in note
    assert notes(2.0, 0.5, 1.0) == []
    (note,) = notes(0.4, 0.5, 1.0)
    assert "where dense takes 0.4 s" in note
    assert notes(2.0, 0.95, 1.0, device_type="cpu") == []


def test_budgets_that_collapse_are_said():
    def notes(*cells):
        return list(remarks([dense_cell(9.0), *cells], ("budget", "top_p")))

    one = sparse_cell("near budget=0.1", 0.300, 1.0, {"budget": 0.1, "pool": 2})
    same = sparse_cell("near budget=0.2", 0.301, 1.0, {"budget": 0.2, "pool": 2})
    (note,) = notes(one, same)
    assert note.startswith("near budget=0.1 and near budget=0.2 compute the same share of attention (0.301)")
    assert notes(one, {**same, "density": {"all_calls": 0.4}}) == []
    assert notes(one, {**same, "settings": {"budget": 0.2, "pool": 1}}) == []  # another family: not a matter of budgets


def test_notes_of_a_page_hold_remarks(sweep_folder, tmp_path):
    def collapse(content):
        for cell in content["cells"]:
            if cell["role"] == "accelerated" and cell["status"] == "finished":
                cell["density"]["all_calls"] = 0.5
                cell["method"]["top_p"] = 0.1 if cell["label"].endswith("7") else 0.9

    data = load_page_data(copy(sweep_folder, tmp_path / "sweep", collapse))
    assert sum("compute the same share" in note for note in data["notes"]) == 1
