"""README's code is run, its commands are what .ci/run takes, and its names exist."""

import importlib.util
import re
import subprocess
from pathlib import Path

import torch

from svg.configs import preset_names

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def block(opening):
    return re.search(rf"^```{opening}\n(.*?)^```", README, re.MULTILINE | re.DOTALL).group(1)


def test_python_lines_run(tmp_path, capsys):
    path = ROOT / "tests" / "pipelines" / "conftest.py"
    spec = importlib.util.spec_from_file_location("tiny_pipelines", path)
    tiny = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tiny)
    torch.manual_seed(0)
    tiny.BUILDERS["wan"]().save_pretrained(tmp_path)
    code = block("python")
    small = {
        '"Wan-AI/Wan2.1-T2V-14B-Diffusers"': repr(str(tmp_path)),
        "torch.bfloat16": "torch.float32",
        '"cuda"': '"cpu"',
        "height=720, width=1280, num_frames=81": "height=32, width=48, num_frames=9, num_inference_steps=3",
    }
    for before, after in small.items():
        assert code.count(before) == 1
        code = code.replace(before, after)
    names = {}
    capsys.readouterr()
    exec(compile(code, "README.md", "exec"), names)
    assert 0 < float(capsys.readouterr().out.splitlines()[-1]) <= 1
    assert len(names["video"]) == 9
    assert not any("Sparse" in type(p).__name__ for p in names["pipe"].transformer.attn_processors.values())


def test_commands_are_one_line_each():
    for name in ("main-job", "tests"):
        lines = block(f"bash {name}").splitlines()
        assert len(lines) == 1 and lines[0].startswith("python3 -m venv .venv && ")
    assert "svg generate" in block("bash main-job") and block("bash tests").rstrip().endswith(".venv/bin/pytest --all -n 2")
    subprocess.run(["bash", "-n", ROOT / ".ci" / "run"], check=True)


def test_presets_and_links_exist():
    table = next(line for line in README.splitlines() if line.startswith("| model | pipelines"))
    rows = README[README.index(table) :].split("\n\n")[0].splitlines()[2:]
    assert set(re.findall(r"`([^`]+)`", " ".join(row.split("|")[3] for row in rows))) == set(preset_names())
    text_links = [link for link in re.findall(r"\]\(([^)]+)\)", README) if "://" not in link]
    assert "docs/architecture.md" in text_links
    for link in text_links:
        assert (ROOT / link).exists(), link
