"""Build the documentation's site into site/, strictly: a dead link or a name that is gone is an error.

pip install -e '.[docs]'
python scripts/build_docs.py

The report pages of measured sweeps and tunings are made from docs/pages/, their data.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

from wheel_layout import ROOT, lay_out

from svg.documents import read_json
from svg.eval.page.build import render


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
