"""Compare what two work trees compute, bit for bit.

    python -m tools.pins OTHER_TREE          # this tree and another, in this environment
    python -m tools.pins --save pins.json    # what this tree computes, to compare later
    python -m tools.pins OTHER_TREE --only optimizer readers

For changes that are to change nothing, as moves and merges of equal arithmetic. What is pinned is a
hash of every result: steps of optimizers, gradients of meta-training, answers of packaged readers,
weights of untrained models, names of state, structures, files and help texts. Things are looked up
by name, wherever a tree has them, so that they may move. One thread, about two minutes a tree.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from .inside import GROUPS, Pins

HERE = Path(__file__).resolve().parents[2]


def main(arguments: list[str] | None = None) -> int:
    """Compare, or save; 1 where something differs."""
    parser = argparse.ArgumentParser(prog="python -m tools.pins", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("other", nargs="?", type=Path, help="work tree, or a file of --save")
    parser.add_argument("--save", type=Path, help="write this tree's pins to a file")
    parser.add_argument("--only", nargs="+", choices=sorted(GROUPS), default=sorted(GROUPS))
    given = parser.parse_args(arguments)
    found = pins_of(HERE, given.only)
    if given.save is not None:
        given.save.write_text(json.dumps(found, indent=1))
    if given.other is None:
        print(json.dumps(found, indent=1))
        return 0
    if given.other.is_file():
        other = json.loads(given.other.read_text())
        other = {k: v for k, v in other.items() if k.partition("/")[0] in given.only}
    else:
        other = pins_of(given.other.resolve(), given.only)
    different = [k for k in sorted(found | other) if found.get(k) != other.get(k)]
    failed = [k for k in sorted(found) if found[k].startswith("failed")]
    for key in different:
        print(f"{key}: here {found.get(key)}, there {other.get(key)}")
    for key in failed:
        print(f"{key}: {found[key]}")
    print(f"{len(found)} pins, {len(different)} differ, {len(failed)} could not be made here")
    return 1 if different or failed else 0


def pins_of(tree: Path, groups: list[str]) -> Pins:
    """Pins of a work tree, made in a process of its own that imports that tree."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "pins.json"
        # The packages of that tree, but these pins, whichever it has itself.
        path = os.pathsep.join((str(tree), str(HERE / "tools")))
        environment = os.environ | {
            "PYTHONPATH": path, "COLUMNS": "100", "OMP_NUM_THREADS": "1", "L2O_GRAPH_DATA": "",
        }  # fmt: skip
        program = [sys.executable, "-W", "ignore", "-m", "pins.inside", str(out), *groups]
        subprocess.run(program, check=True, cwd=folder, env=environment)
        return json.loads(out.read_text())


if __name__ == "__main__":
    sys.exit(main())
