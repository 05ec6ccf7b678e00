"""Run the embedded demo and record its report.

    python benchmarks/demo.py [--full] [--out runs/benchmark-demo]

Writes benchmarks/results/demo.json (demo_full.json with --full).
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from machine import ROOT, describe

from tsld_fx.demo.run import run_demo
from tsld_fx.whole_files import write_json


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--full", action="store_true")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    name = "demo_full" if args.full else "demo"
    report = run_demo(args.out or Path("runs") / f"benchmark-{name}", full=args.full)
    out = ROOT / "benchmarks" / "results" / f"{name}.json"
    write_json(out, {"machine": describe(), **report})
    print(
        json.dumps({k: report[k] for k in ("perplexity", "gap_closed", "steps", "seconds", "train_seconds")}, indent=2)
    )


if __name__ == "__main__":
    main()
