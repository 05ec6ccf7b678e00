"""Put the summary of an analysis among the recorded results, with the machine and the command that made it.

    tsld-fx analyze TEACHER STUDENT --text FILE --out runs/analysis
    python benchmarks/record_analysis.py runs/analysis NAME --options "--length 512 --windows 8"

Writes benchmarks/results/analysis_<NAME>.json.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from machine import ROOT, describe

from tsld_fx.whole_files import write_json


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("name")
    parser.add_argument("--options", default="", help="the options of tsld-fx analyze, for the record")
    args = parser.parse_args()
    summary = json.loads((args.folder / "summary.json").read_text())
    record = {"machine": describe(), "options": args.options, "summary": summary}
    file = ROOT / "benchmarks/results" / f"analysis_{args.name}.json"
    write_json(file, record)
    print(file.name)


if __name__ == "__main__":
    main()
