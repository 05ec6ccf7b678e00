"""ONNX: lowered models as `.onnx` files in three dialects, and the operator library for onnxruntime.

`export.py` is the way through it: capture, one opaque node per packed layer (`graph.py`), a dialect (`custom.py`,
`ort.py`, `qdq.py`), the file (`write.py`), the check (`verify.py`).
"""
