"""A packed decoder as a TVM program: compiled, run from torch, and run by a script that needs no torch.

python examples/tvm_program.py [folder to write, default a temporary one]
"""

import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import tsld_fx
import tsld_fx.relax

shape = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
model = LlamaForCausalLM(LlamaConfig(vocab_size=256, max_position_embeddings=64, **shape)).eval()
lowered = tsld_fx.convert(tsld_fx.prepare(model))

module = tsld_fx.to_relax(lowered)  # an IRModule, for your own passes
print(module["main"].script()[:300])

folder = Path(sys.argv[1] if len(sys.argv) > 1 else f"{tempfile.mkdtemp()}/my-program")
tsld_fx.relax.compile(lowered, folder, runtime=True)
program = tsld_fx.relax.load(folder)
ids = torch.tensor([[5, 6, 7]])
assert torch.allclose(program(ids), lowered(input_ids=ids).logits, atol=1e-4)

tokens = program.generate(ids, 8)[0].tolist()
done = subprocess.run(
    [sys.executable, str(folder / "run.py"), "--ids", "5 6 7", "--max-new-tokens", "8"],
    capture_output=True,
    text=True,
    check=True,
)
assert list(map(int, done.stdout.split())) == tokens
print(tokens)
