"""What stands beside the weights: the model's metadata, config.json, tokenizer files, genai_config.json."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path
from typing import Any

import onnx_ir as ir

from tsld_fx.lowered import LoweredModel
from tsld_fx.onnx.requirements import Requirements

TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json",
    "merges.txt", "tokenizer.model", "chat_template.jinja",
)  # fmt: skip
# Model types by which onnxruntime-genai runs a plain decoder with one key and one value per layer. It knows `gpt2` as
# another cache layout, and has no name for the others; their graphs are decoders like llama's.
GENAI_TYPES = ("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "phi", "phi3", "olmo", "smollm3")


def describe(model: ir.Model, dialect: str, activations: str, needs: Requirements) -> None:
    """Write into the file who made it and what it needs."""
    from tsld_fx import __version__

    model.producer_name, model.producer_version, model.domain = "tsld_fx", __version__, ""
    model.doc_string = None
    model.metadata_props.clear()
    model.metadata_props.update(
        {
            "tsld_fx.dialect": dialect,
            "tsld_fx.activations": activations,
            "tsld_fx.requires": needs.text,
            "tsld_fx.version": __version__,
        }
    )
    for node in model.graph.all_nodes():  # the exporter's traces of the Python code
        node.metadata_props.clear()
        node.doc_string = None


def write_beside(lowered: LoweredModel, folder: Path, model: str, kv_cache: bool, tokenizer: Any) -> None:
    """config.json and generation_config.json as transformers reads them, the tokenizer, genai_config.json."""
    config = copy.deepcopy(lowered.config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config  # the ONNX file holds the weights; nothing is left to quantise
    config.save_pretrained(folder)
    if getattr(lowered, "generation_config", None) is not None:
        lowered.generation_config.save_pretrained(folder)
    if tokenizer is not None and hasattr(tokenizer, "save_pretrained"):
        tokenizer.save_pretrained(folder)
    else:
        source = Path(tokenizer or lowered.name_or_path or "")
        for name in TOKENIZER_FILES:
            if lowered.name_or_path and (source / name).is_file():
                shutil.copyfile(source / name, folder / name)
    if kv_cache:
        text = json.dumps(genai_config(lowered, model), indent=2)
        (folder / "genai_config.json").write_text(text + "\n", encoding="utf-8")


def genai_config(lowered: LoweredModel, model: str) -> dict[str, Any]:
    """What onnxruntime-genai needs to know of a decoder with a cache that grows (not a shared buffer)."""
    config, generation = lowered.config.get_text_config(), lowered.generation_config
    heads = config.num_attention_heads
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    size = getattr(config, "head_dim", None) or config.hidden_size // heads
    length = int(getattr(config, "max_position_embeddings", None) or 2048)

    def token(name: str, default: int) -> Any:
        for source in (generation, config):
            if (value := getattr(source, name, None)) is not None:
                return value
        return default

    end = token("eos_token_id", 0)
    last = end[0] if isinstance(end, list) else end
    return {
        "model": {
            "type": config.model_type if config.model_type in GENAI_TYPES else "llama",
            "vocab_size": config.vocab_size,
            "context_length": length,
            "bos_token_id": token("bos_token_id", last),
            "eos_token_id": end,
            "pad_token_id": token("pad_token_id", last),
            "decoder": {
                "filename": model,
                "head_size": size,
                "hidden_size": config.hidden_size,
                "num_attention_heads": heads,
                "num_key_value_heads": kv_heads,
                "num_hidden_layers": config.num_hidden_layers,
                "session_options": {"log_id": "onnxruntime-genai", "provider_options": []},
                "inputs": {
                    "input_ids": "input_ids",
                    "attention_mask": "attention_mask",
                    "position_ids": "position_ids",
                    "past_key_names": "past_key_values.%d.key",
                    "past_value_names": "past_key_values.%d.value",
                },
                "outputs": {
                    "logits": "logits",
                    "present_key_names": "present.%d.key",
                    "present_value_names": "present.%d.value",
                },
            },
        },
        "search": {
            "max_length": length,
            "do_sample": False,
            "num_beams": 1,
            "past_present_share_buffer": False,
        },
    }
