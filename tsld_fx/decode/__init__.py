"""Generation with a static KV cache: prefill and decode graphs of a lowered model, replayed as CUDA graphs.

graphs.py     lowered model -> prefill and decode graphs
select.py     logits -> next token: greedy and sampling
prefill.py    the prompt
state.py      what a step reads and changes besides the cache
decoder.py    Decoder, the call
options.py    which calls of `generate` it serves
"""

from tsld_fx.decode.decoder import Decoder

__all__ = ["Decoder"]
