"""Build the documentation's site into site/, strictly: a dead link or a name that is gone is an error.

pip install -e '.[docs]'
python scripts/build_docs.py

The report pages of measured sweeps and tunings are made from docs/pages/, their data.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
from pathlib import Path

from svg.documents import read_json
from svg.eval.page.build import render

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
    code = subprocess.run(command, cwd=ROOT).returncode
    if code == 0:
        write_pages(args.out)
    return code


def write_pages(target: Path) -> None:
    """Write every report page whose data lies in docs/pages/."""
    for path in sorted((ROOT / "docs" / "pages").glob("*.json")):
        page = target / "pages" / f"{path.stem}.html"
        page.parent.mkdir(parents=True, exist_ok=True)
        page.write_text(render(read_json(path)), encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
