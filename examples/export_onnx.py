"""Export a packed model with KV cache and generate in plain onnxruntime, without torch or transformers in the loop.

python examples/export_onnx.py [folder of a model, default the embedded one]
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import numpy as np
import onnxruntime

import tsld_fx
from tsld_fx.model_folders import load_float, load_tokenizer


def main() -> None:
    """Convert, export, generate."""
    name = sys.argv[1] if len(sys.argv) > 1 else "demo"
    lowered = tsld_fx.convert(tsld_fx.prepare(load_float(name)), backend="reference")
    tokenizer = load_tokenizer(name)
    with tempfile.TemporaryDirectory() as folder:
        file = tsld_fx.export_onnx(lowered, Path(folder) / "model", kv_cache=True, verify=False, tokenizer=tokenizer)
        session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
        prompt = np.asarray([tokenizer("def ")["input_ids"]], dtype=np.int64)
        print(tokenizer.decode(generate(session, prompt, 16)[0]))


def generate(session: onnxruntime.InferenceSession, tokens: np.ndarray, steps: int) -> np.ndarray:
    """Greedy decoding of [1, T] token numbers: the cache goes out of one call and into the next."""
    inputs = {value.name: value for value in session.get_inputs()}
    past = [name for name in inputs if name.startswith("past_key_values.")]
    _, heads, _, size = inputs[past[0]].shape
    cache = [np.zeros((1, heads, 0, size), np.float32) for _ in past]
    current = tokens
    for _ in range(steps):
        length = tokens.shape[1]
        feed = {
            "input_ids": current,
            "attention_mask": np.ones((1, length), np.int64),
            "position_ids": np.arange(length - current.shape[1], length)[None],
            **dict(zip(past, cache, strict=True)),
        }
        logits, *cache = session.run(None, feed)
        current = logits[:, -1:].argmax(-1)
        tokens = np.concatenate([tokens, current], axis=1)
    return tokens


if __name__ == "__main__":
    main()
