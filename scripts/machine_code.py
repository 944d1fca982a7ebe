"""Prints what every kernel of the ahead-of-time suite compiles to, or compares it with an earlier run.

    python scripts/machine_code.py --out before.json
    python scripts/machine_code.py --against before.json [--out after.json] [--arch 90]

Needs no GPU. A change that only moves or renames code must leave every row equal, the hash of its instructions included.
"""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

COMPILER = Path(__file__).parents[1] / "tests" / "support" / "triton_aot.py"
ARCHS = (80, 89, 90, 100, 120)
RESOURCES = ("registers", "spills", "reloads", "shared", "instructions", "matrix")


def compiled(arch):
    """{"case / kernel / n-th launch of it": what came out} for one architecture."""
    run = subprocess.run(
        [sys.executable, "-P", COMPILER, str(arch)], check=True, capture_output=True, text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    rows, launches = {}, {}
    for row in json.loads(run.stdout):
        name = f"{row.pop('case')} / {row.pop('kernel')}"
        launches[name] = launches.get(name, 0) + 1
        rows[f"{name} / {launches[name]}"] = row
    return rows


def compare(before, after):
    """Prints what differs and returns the number of rows whose resources differ."""
    differing = moved = 0
    for name in sorted(before.keys() | after.keys()):
        if name not in before or name not in after:
            differing += 1
            print(f"  {name}: only {'after' if name in after else 'before'}")
            continue
        old, new = before[name], after[name]
        changes = [f"{key} {old[key]} -> {new[key]}" for key in RESOURCES if old[key] != new[key]]
        differing += bool(changes)
        moved += old["code"] != new["code"]
        if changes:
            print(f"  {name}: {', '.join(changes)}")
        elif old["code"] != new["code"]:
            print(f"  {name}: other instructions, equal resources")
    print(f"  {len(after)} launches: {differing} with other resources, {moved} with other instructions")
    return differing


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", type=int, choices=ARCHS, action="append", help="repeatable; default: all")
    parser.add_argument("--out", type=Path, help="write the rows to this file")
    parser.add_argument("--against", type=Path, help="a file of --out to compare with")
    options = parser.parse_args()
    found = {}
    before = json.loads(options.against.read_text()) if options.against else None
    differing = 0
    for arch in options.arch or ARCHS:
        found[str(arch)] = compiled(arch)
        print(f"sm{arch}", flush=True)
        if before is not None:
            differing += compare(before[str(arch)], found[str(arch)])
    if options.out:
        options.out.write_text(json.dumps(found, indent=1, sort_keys=True))
    sys.exit(1 if differing else 0)


if __name__ == "__main__":
    main()
