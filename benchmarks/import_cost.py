"""What `import diffx` costs beside `import diffusers`: fresh processes, taken in turn, CPU seconds of the import alone.

    python benchmarks/import_cost.py

Writes results/import_cost.md.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
from pathlib import Path

import diffusers
import torch

FILE = Path(__file__).resolve().parent / "results" / "import_cost.md"
IMPORTS = {
    "`import torch`": "torch",
    "`import diffusers`": "diffusers",
    "`import diffusers.pipelines`": "diffusers.pipelines",
    "`import diffx`": "diffx",
    "`import diffx.conditioning.hints`": "diffx.conditioning.hints",
}
TIMED = "import sys, time; start = time.process_time(); __import__(sys.argv[1]); print(time.process_time() - start, len(sys.modules))"


def measure(name: str) -> tuple[float, int]:
    """(CPU seconds, modules loaded) of one import in a process of its own."""
    printed = subprocess.run(
        [sys.executable, "-c", TIMED, name], capture_output=True, text=True, check=True, env=os.environ | {"OMP_NUM_THREADS": "1"}
    ).stdout.split()
    return float(printed[0]), int(printed[1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=10)
    runs = parser.parse_args().runs
    for name in IMPORTS.values():
        measure(name)  # the first one reads the disk
    found: dict[str, list[tuple[float, int]]] = {title: [] for title in IMPORTS}
    for _ in range(runs):
        for title, name in IMPORTS.items():
            found[title].append(measure(name))
    base = statistics.median(seconds for seconds, _ in found["`import diffusers`"])
    lines = [
        "# What an import costs",
        "",
        f"`python benchmarks/import_cost.py`: {runs} fresh processes each, taken in turn after one that warms the disk; CPU seconds, one "
        f"thread, median and range. torch {torch.__version__}, diffusers {diffusers.__version__}.",
        "",
        "| | median | least | most | times `import diffusers` | modules |",
        "|:---|---:|---:|---:|---:|---:|",
    ]
    for title, values in found.items():
        seconds = [value for value, _ in values]
        middle = statistics.median(seconds)
        lines.append(f"| {title} | {middle:.2f} | {min(seconds):.2f} | {max(seconds):.2f} | {middle / base:.2f} | {values[0][1]} |")
    FILE.write_text("\n".join(lines) + "\n")
    print(FILE.read_text())


if __name__ == "__main__":
    main()
