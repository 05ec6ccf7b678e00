"""Peak memory of exporting a model of more than 2 GB, against the size of the file.

python benchmarks/onnx_memory.py [--vocabulary 200000]

The model is LLaMA-shaped, with two layers of TinyLlama's and a vocabulary that makes it large. The process holds the
model itself, torch and the exporter; the peak is that of the whole process (ru_maxrss), before and after the export.
"""

from __future__ import annotations

import argparse
import json
import resource
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
ROOT = Path(__file__).resolve().parent.parent


def main() -> None:
    """Export each dialect once and print peak / file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vocabulary", type=int, default=200_000)
    parser.add_argument("--dialect", default="custom", choices=["custom", "ort", "qdq"])
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results/onnx_memory.json")
    args = parser.parse_args()
    from bench_onnx import lowered_model
    from machine import describe

    import tsld_fx
    from tsld_fx.whole_files import write_json

    lowered = lowered_model("llama-1.1b", 2, args.vocabulary)
    before, started = peak(), time.perf_counter()
    with tempfile.TemporaryDirectory(dir=".") as folder:
        file = tsld_fx.export_onnx(lowered, Path(folder) / "out", args.dialect, verify=False)
        seconds, size = time.perf_counter() - started, sum(f.stat().st_size for f in file.parent.glob("model.onnx*"))
        files = sorted(f.name for f in file.parent.glob("model.onnx*"))
    result = {
        "machine": describe(), "dialect": args.dialect, "files": files, "file_mb": round(size / 1e6),
        "peak_before_mb": round(before / 1e6), "peak_mb": round(peak() / 1e6), "seconds": round(seconds, 1),
        "peak_over_file": round(peak() / size, 3), "added_over_file": round((peak() - before) / size, 3),
    }  # fmt: skip
    write_json(args.out, result)
    print(json.dumps(result, indent=2))


def peak() -> int:
    """Largest resident memory of this process so far, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


if __name__ == "__main__":
    main()
