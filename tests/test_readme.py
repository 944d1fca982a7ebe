"""README's code is run, its commands are what .ci/run takes, and its names exist."""

import re
import subprocess
from pathlib import Path

from tiny_pipelines import saver

from svg.configs import preset_names

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def block(opening):
    return re.search(rf"^```{opening}\n(.*?)^```", README, re.MULTILINE | re.DOTALL).group(1)


def test_python_lines_run(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = saver(tmp_path)("wan")
    code = block("python")
    small = {
        '"Wan-AI/Wan2.1-T2V-14B-Diffusers"': repr(str(model)),
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
    assert "computed, all calls" in capsys.readouterr().out and Path("cat.mp4").is_file()
    assert len(names["video"]) == 9
    assert names["svg"].report(names["pipe"])["config"]["method"] == "near"


def test_commands_are_one_line_each():
    for name in ("main-job", "tests"):
        lines = block(f"bash {name}").splitlines()
        assert len(lines) == 1 and lines[0].startswith("python3 -m venv .venv && ")
    assert "svg generate" in block("bash main-job") and block("bash tests").rstrip().endswith(
        ".venv/bin/pytest --all -n 2"
    )
    subprocess.run(["bash", "-n", ROOT / ".ci" / "run"], check=True)


def test_links_and_presets_exist():
    text_links = [link for link in re.findall(r"\]\(([^)]+)\)", README) if "://" not in link]
    assert "docs/architecture.md" in text_links
    for link in text_links:
        assert (ROOT / link).exists(), link
    assert set(re.findall(r"--preset ([\w.-]+)", README)) <= set(preset_names())


def test_the_first_screen_fits():
    """Up to the table of methods: at most 65 lines, none so wide that a block of 1012 pixels would scroll."""
    lines = README[: README.index("## Models")].splitlines()
    assert len(lines) <= 65
    inside = False
    for line in lines:
        inside = inside != line.startswith("```")
        assert not inside or len(line) <= 110, line  # monospace: 1012 px hold some 118 characters


def test_methods_of_the_table_exist():
    from svg.config import METHODS

    rows = README[README.index("| method | use it when") :].split("\n\n")[0].splitlines()
    assert len(rows[0].split("|")) == 6  # four columns
    assert {re.search(r"`([^`]+)`", row).group(1) for row in rows[2:]} <= set(METHODS)
