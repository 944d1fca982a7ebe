"""`svg models`, `svg.supported_models()` and the table in the docs are one."""

from pathlib import Path

import diffusers

import svg
from svg.cli.app import main

PAGE = Path(__file__).parents[2] / "docs" / "models.md"


def test_the_page_holds_what_the_command_prints(capsys):
    """After a change: svg models --markdown, and put it below the page's heading of the table."""
    assert main(["models", "--markdown"]) == 0
    assert PAGE.read_text().endswith(capsys.readouterr().out)


def test_the_command_lists_every_class_with_its_layout_or_the_reason(capsys):
    assert main(["models"]) == 0
    lines = capsys.readouterr().out.splitlines()
    rows = svg.supported_models()
    assert [line.split()[0] for line in lines] == [row["transformer"] for row in rows]
    assert any("refused: its attention is linear" in line for line in lines)
    assert any("packed: prefix, video" in line for line in lines)


def test_every_pipeline_of_the_table_is_one_of_diffusers():
    for row in svg.supported_models():
        assert hasattr(diffusers, row["transformer"]), row
        assert all(hasattr(diffusers, name) for name in row["pipelines"]), row
