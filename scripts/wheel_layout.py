"""The sources laid out as a wheel has them: tools that read sources don't find packages that lie elsewhere."""

from __future__ import annotations

import shutil
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("kernels", "pipelines", "eval", "configs")  # of the repository; packages below svg once installed


def lay_out(target: Path) -> Path:
    """Copy the package to target/svg, without the bundled model.

    Args:
        target: a folder; what is there is removed.

    Returns:
        target.
    """
    shutil.rmtree(target, ignore_errors=True)
    ignore = shutil.ignore_patterns("__pycache__", "tiny-wan")
    shutil.copytree(ROOT / "svg", target / "svg", ignore=ignore)
    for folder in FOLDERS:
        shutil.copytree(ROOT / folder, target / "svg" / folder, ignore=ignore)
    return target
