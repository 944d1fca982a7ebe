"""Check the types of the package as it is installed, by pyright in basic mode.

pip install -e '.[dev]'
python scripts/check_types.py

Modules with jit code are the compiler's to check: pyright does not know what a kernel's arguments are.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from wheel_layout import ROOT, lay_out

JIT = ("@triton.jit", "@gluon.jit")


def has_jit_code(path: Path) -> bool:
    text = path.read_text(encoding="utf-8")
    return any(mark in text for mark in JIT)


def main() -> int:
    folder = lay_out(ROOT / "build" / "types")
    jit = [path for path in sorted((folder / "svg" / "kernels").rglob("*.py")) if has_jit_code(path)]
    settings = {
        "include": ["svg"],
        "exclude": [str(path.relative_to(folder)) for path in jit],
        "typeCheckingMode": "basic",
        "pythonVersion": "3.11",
        "reportMissingImports": "warning",  # of peers and extras, which need not be there
    }
    (folder / "pyrightconfig.json").write_text(json.dumps(settings))
    command = [sys.executable, "-m", "pyright", "--project", str(folder), "--pythonpath", sys.executable]
    return subprocess.run([*command, "--level", "error"]).returncode


if __name__ == "__main__":
    sys.exit(main())
