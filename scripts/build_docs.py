"""Build the documentation's site into site/, strictly: a dead link or a name that is gone is an error.

pip install -e '.[docs]'
python scripts/build_docs.py
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("kernels", "pipelines", "eval", "configs")  # of the repository; packages below svg once installed


def lay_out(target: Path) -> None:
    """Copy the sources as a wheel has them: tools that read sources don't find packages that lie elsewhere."""
    shutil.rmtree(target, ignore_errors=True)
    ignore = shutil.ignore_patterns("__pycache__", "tiny-wan")
    shutil.copytree(ROOT / "svg", target / "svg", ignore=ignore)
    for folder in FOLDERS:
        shutil.copytree(ROOT / folder, target / "svg" / folder, ignore=ignore)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=ROOT / "site")
    args = parser.parse_args()
    lay_out(ROOT / "build" / "docs-packages")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(args.out.resolve())]
    return subprocess.run(command, cwd=ROOT).returncode


if __name__ == "__main__":
    sys.exit(main())
