"""From a float decoder to packed ternary weights, in Python: prepare, train with TSLD, convert, generate, save, load.

    python examples/train_and_convert.py [--steps 6]

It uses the small decoder and the text that come with tsld_fx, so nothing is downloaded. For your own model, load
it with AutoModelForCausalLM.from_pretrained(..., dtype=torch.float32), and give a data set of your own.
"""

from __future__ import annotations

import argparse
import tempfile

import torch
from transformers import TrainingArguments

import tsld_fx
from tsld_fx import DistillConfig, QuantConfig, TernaryWeight, TSLDTrainer
from tsld_fx.model_folders import load_float, load_tokenizer
from tsld_fx.perplexity import perplexity
from tsld_fx.text_data import TokenBlocks, read_documents, tokenize

BLOCK = 128  # tokens per sample
VALIDATION_TOKENS = 8 * BLOCK  # a small part of the validation text, to be quick
PROMPT = "Return a new list"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=6, help="training steps; a few hundred give a usable model")
    steps = parser.parse_args().steps
    tokenizer = load_tokenizer("demo")
    teacher = load_float("demo")
    validation = tokenize(read_documents("demo", "validation"), tokenizer)[:VALIDATION_TOKENS]
    print(f"full precision          {perplexity(teacher, validation, BLOCK).perplexity:8.2f}")

    # prepare: the same parameters, fake-quantised in a graph. The teacher is a second copy of the model.
    prepared = tsld_fx.prepare(load_float("demo"), QuantConfig(TernaryWeight(scale="twn", granularity="channel")))
    print(f"ternary, no training    {perplexity(prepared, validation, BLOCK).perplexity:8.2f}")

    with tempfile.TemporaryDirectory() as folder:
        trainer = TSLDTrainer(
            model=prepared,
            teacher=teacher,
            distill=DistillConfig(method="tsld"),
            args=TrainingArguments(
                output_dir=f"{folder}/checkpoints",
                max_steps=steps,
                per_device_train_batch_size=2,
                learning_rate=1e-3,
                lr_scheduler_type="cosine",
                save_strategy="no",
                report_to=[],
                disable_tqdm=True,
                logging_steps=max(1, steps // 5),
                dataloader_pin_memory=False,
                use_cpu=True,
            ),
            train_dataset=TokenBlocks(tokenize(read_documents("demo", "train"), tokenizer), BLOCK),
        )
        trainer.train()
        prepared.eval()
        trained = perplexity(prepared, validation, BLOCK).perplexity
        print(f"ternary, {steps:4d} steps     {trained:8.2f}")

        # convert: packed weights, two bits each. Save, load, generate.
        lowered = tsld_fx.convert(prepared)
        lowered.save_pretrained(f"{folder}/packed")
        loaded = tsld_fx.load(f"{folder}/packed")
    packed = perplexity(loaded, validation, BLOCK).perplexity
    print(f"packed, saved, loaded   {packed:8.2f}")
    assert abs(packed - trained) < 1e-3 * trained

    inputs = tokenizer(PROMPT, return_tensors="pt")
    with torch.no_grad():
        made = loaded.generate(
            input_ids=inputs["input_ids"],
            attention_mask=inputs["attention_mask"],
            max_new_tokens=24,
            do_sample=False,
            pad_token_id=tokenizer.eos_token_id,
        )
    print(tokenizer.decode(made[0], skip_special_tokens=True))


if __name__ == "__main__":
    main()
