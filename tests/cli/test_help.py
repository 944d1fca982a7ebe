"""Help: panels, groups, an example everywhere, and what a shell completes."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import click
import pytest

from svg.cli import cli, main
from svg.cli.panels import COMMANDS, OPTIONS

PANELS = {name: panel for panel, names in OPTIONS.items() for name in names}


@pytest.mark.parametrize("name", sorted(cli.commands))
def test_every_option_has_a_panel_and_every_command_an_example(name, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")
    command = cli.commands[name]
    long = {max(option.opts, key=len) for option in command.params if isinstance(option, click.Option)}
    short = {"--frames" if option == "--num-frames" else option for option in long}
    assert short <= set(PANELS), short - set(PANELS)
    assert main([name, "--help"]) == 0
    text = capsys.readouterr().out
    for panel in {PANELS[option] for option in short} | {"Help"}:
        assert f"╭─ {panel} ─" in text
    assert "╭─ Options ─" not in text and "Example:" in text
    (example,) = re.findall(r"^ +(svg .*?) *$", text[text.index("Example:") :], re.MULTILINE)
    words = shlex.split(example)
    assert words[:2] == ["svg", name]
    command.make_context(name, words[2:], resilient_parsing=False)  # its options and values are those of the command


def test_nothing_in_the_panels_is_gone():
    there = {option for command in cli.commands.values() for param in command.params for option in param.opts}
    assert set(PANELS) - {"--help", "--version"} <= there
    assert sorted(name for names in COMMANDS.values() for name in names) == sorted(cli.commands)


def test_commands_are_in_groups(capsys):
    assert main(["--help"]) == 0
    text = capsys.readouterr().out
    places = [text.index(f"╭─ {name} ─") for name in COMMANDS]
    assert places == sorted(places) and "Example:" in text


def test_without_rich_click_help_is_plain():
    code = "import sys; sys.modules['rich_click'] = None\nfrom svg.cli import main; sys.exit(main(sys.argv[1:]))"
    run = subprocess.run([sys.executable, "-c", code, "sweep", "--help"], capture_output=True, text=True)
    assert run.returncode == 0 and "--budgets" in run.stdout and "╭" not in run.stdout


@pytest.mark.parametrize(
    "words, expected", [("svg ev", "evaluate"), ("svg generate --preset wan2.1-t2v-7", "wan2.1-t2v-720p")]
)
def test_a_shell_completes(words, expected):
    parts = words.split()
    env = {**os.environ, "_SVG_COMPLETE": "bash_complete", "COMP_WORDS": words, "COMP_CWORD": str(len(parts) - 1)}
    code = "import sys; from svg.cli import main; sys.exit(main())"
    run = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert run.stdout.splitlines() == [f"plain,{expected}"], run.stderr


def test_the_lines_of_the_documentation_give_a_script():
    page = (Path(__file__).parents[2] / "docs" / "cli.md").read_text()
    for shell in ("bash", "zsh", "fish"):
        assert f"_SVG_COMPLETE={shell}_source svg" in page
        env = {**os.environ, "_SVG_COMPLETE": f"{shell}_source"}
        code = "import sys; from svg.cli import main; sys.exit(main())"
        run = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
        assert "_SVG_COMPLETE" in run.stdout and "svg" in run.stdout, run.stderr
