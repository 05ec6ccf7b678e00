"""Makes the demo model that ships inside the package: a Llama of 3.5 M parameters, trained from nothing.

    python scripts/make_demo_model.py --corpus novels100.txt.xz

Three stages, each of which starts from the files of the one before:
  tokenizer  byte-level BPE of 2,048 tokens on the demo's train text and slices of the novels
  pretrain   `--pretrain-minutes` on the novels (a GPU; the schedule follows the clock)
  finetune   the recipes FINETUNINGS on the demo's train text; the best by validation loss is written

`--corpus` is text (or text.xz), books separated by <|endoftext|>. `--tokens` and `--documents` name files
that are written at first use and read afterwards, so that another machine, or another Python with other
docstrings, trains on the same data. `--smoke` runs everything in a minute on a CPU, with a useless result.
"""

from __future__ import annotations

import argparse
import math
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from demo_model_data import (
    Splits,
    encode,
    load_tokenizer,
    make_tokenizer,
    read_books,
    read_splits,
    read_tokens,
    whole_files,
)
from demo_model_training import WINDOW, Recipe, Stepper, build_model, evaluate, load_checkpoint, save_checkpoint
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaForCausalLM

PRETRAINING = Recipe(rate=3e-3, batch=64)
FINETUNINGS = (
    Recipe(rate=1e-3, epochs=16, dropout=0.1),
    Recipe(rate=2e-3, epochs=16, dropout=0.1),
    Recipe(rate=1e-3, epochs=16, dropout=0.0),
    Recipe(rate=2e-3, epochs=32, dropout=0.2),
    Recipe(rate=1e-3, epochs=32, dropout=0.2),
    Recipe(rate=4e-3, epochs=32, dropout=0.2),
    Recipe(rate=2e-3, epochs=32, dropout=0.1),
    Recipe(rate=2e-3, epochs=32, dropout=0.1, decay=1.0),
    Recipe(rate=4e-3, epochs=48, dropout=0.2, decay=1.0),
)


def main() -> None:
    layout = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=layout)
    add = parser.add_argument
    add("--corpus", type=Path, help="novels: text or text.xz, separated by <|endoftext|>")
    add("--out", type=Path, default=Path("tsld_fx/demo/assets"))
    add("--stages", default="tokenizer,pretrain,finetune")
    add("--documents", type=Path, help="JSON of the demo's text; written if missing")
    add("--tokens", type=Path, help=".npz of the corpus's tokens; written if missing")
    add("--checkpoint", type=Path, default=Path("runs/demo-pretrained.safetensors"))
    add("--pretrain-minutes", type=float, default=3.0)
    add("--no-cuda-graph", dest="cuda_graph", action="store_false")
    add("--smoke", action="store_true", help="a few steps of everything")
    add("--seed", type=int, default=0)
    args = parser.parse_args()
    read_before = args.tokens is not None and args.tokens.exists()
    if args.corpus is None and ("tokenizer" in args.stages or ("pretrain" in args.stages and not read_before)):
        parser.error("--corpus is needed: text (or text.xz) of books separated by <|endoftext|>")
    args.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    args.cuda_graph &= args.device.type == "cuda"
    torch.manual_seed(args.seed)
    splits = read_splits(args.documents)
    if "tokenizer" in args.stages:
        make_tokenizer(args.out, splits["train"], read_books(args.corpus))
    if "pretrain" in args.stages:
        pretrain(args)
    if "finetune" in args.stages:
        finetune(args, splits)


def pretrain(args: argparse.Namespace) -> None:
    """Trains on the novels for `--pretrain-minutes`, whatever the speed."""
    tokens, held_out = read_tokens(args)
    model = build_model(args.device)
    recipe = PRETRAINING if not args.smoke else Recipe(rate=1e-3, batch=2)
    stepper = Stepper(model, tokens, recipe, args.cuda_graph)
    seconds, every, size = (60 * args.pretrain_minutes, 2000, 50_000) if not args.smoke else (8, 10, 2000)
    start = time.monotonic()

    def report(step: int) -> None:
        seen, perplexity = step * recipe.batch * WINDOW, math.exp(evaluate(model, held_out[:size]))
        notes = {"steps": f"{step:,}", "tokens": f"{seen / 1e6:.0f} M", "epochs": f"{seen / len(tokens):.1f}",
                 "perplexity": f"{perplexity:.2f}"}  # fmt: skip
        print(f"pretrain: {time.monotonic() - start:4.0f} s, loss {stepper.loss:.3f}, {notes}", flush=True)
        save_checkpoint(args.checkpoint, model, notes)

    stepper.train(lambda step: (time.monotonic() - start) / seconds, every, report)


def finetune(args: argparse.Namespace, splits: Splits) -> None:
    """Tries FINETUNINGS one after another and writes the epoch with the lowest validation loss to `--out`."""
    tokenizer, data = load_tokenizer(args.out), {}
    for split, texts in splits.items():
        ids = torch.from_numpy(encode(tokenizer, list(texts.values()))).to(args.device)
        data[split] = ids if not args.smoke else ids[:3000]
    best, rows = math.inf, []
    for recipe in FINETUNINGS if not args.smoke else (Recipe(rate=1e-3, batch=2, epochs=2, dropout=0.1),) * 2:
        model, losses = try_recipe(args, recipe, data)
        lowest = min(losses)
        settings = f"| {recipe.rate:g} | {recipe.dropout:g} | {recipe.decay:g} | {recipe.epochs} |"
        best_epoch = losses.index(lowest) + 1
        rows.append(f"{settings} {best_epoch} | {math.exp(lowest):.2f} | {math.exp(losses[-1]):.2f} |")
        print("finetune:", rows[-1], flush=True)
        if lowest < best:
            best = lowest
            write_model(args.out, model)
    write_card(args, splits, data, rows)


def try_recipe(
    args: argparse.Namespace, recipe: Recipe, data: dict[str, Tensor]
) -> tuple[LlamaForCausalLM, list[float]]:
    """The pretrained model, fine-tuned, with the weights of its best epoch; and the validation loss (nats per
    token) after each epoch."""
    torch.manual_seed(args.seed)
    model, _ = load_checkpoint(args.checkpoint, args.device)
    for name, module in model.named_modules():
        if name.endswith(("embed_tokens", "o_proj", "down_proj")):
            module.register_forward_hook(lambda m, _, output: F.dropout(output, recipe.dropout, m.training))
    losses: list[float] = []
    best: dict[str, Tensor] = {}

    def report(step: int) -> None:
        losses.append(evaluate(model, data["validation"]))
        if losses[-1] == min(losses):
            best.update({key: value.clone() for key, value in model.state_dict().items()})

    epoch = len(data["train"]) // (recipe.batch * WINDOW)
    stepper = Stepper(model, data["train"], recipe, args.cuda_graph)
    stepper.train(lambda step: step / (recipe.epochs * epoch), epoch, report)
    model.load_state_dict(best)
    return model, losses


# --- results


def write_model(out: Path, model: LlamaForCausalLM) -> None:
    plain = LlamaForCausalLM(model.config)
    plain.load_state_dict(model.state_dict())
    with whole_files(out) as scratch:
        plain.half().save_pretrained(scratch)


def write_card(args: argparse.Namespace, splits: Splits, data: dict[str, Tensor], rows: list[str]) -> None:
    """README.md, with what the files in `--out` measure and a sample of 100 tokens."""
    model = AutoModelForCausalLM.from_pretrained(args.out, dtype=torch.float32).to(args.device)
    measured, sizes = [], []
    for split, ids in data.items():
        text = "".join(splits[split].values())
        sizes.append(f"| {split} | {len(splits[split])} | {len(text):,} | {len(ids):,} |")
        for window in (128, 256, 512) if split != "train" else (256,):
            loss = evaluate(model, ids, window)
            bits = loss * (len(ids) - 1) / math.log(2) / len(text.encode())
            measured.append(f"| {split} | {window} | {math.exp(loss):.2f} | {bits:.3f} |")
    torch.manual_seed(args.seed)
    tokenizer = load_tokenizer(args.out)
    prompt = torch.tensor([[0, *tokenizer.encode("The method returns").ids]], device=args.device)
    ids = model.generate(prompt, max_new_tokens=100, do_sample=True, temperature=0.7)[0].tolist()
    card = (
        (Path(__file__).parent / "demo_model_card.md")
        .read_text(encoding="utf-8")
        .format(
            parameters=f"{sum(p.numel() for p in model.parameters()):,}",
            sizes="\n".join(sizes),
            measured="\n".join(measured),
            recipes="\n".join(rows),
            sample="\n".join(f"    {line}".rstrip() for line in tokenizer.decode(ids).splitlines()),
            **load_checkpoint(args.checkpoint, args.device)[1],
        )
    )
    print(card, flush=True)
    with whole_files(args.out) as scratch:
        (scratch / "README.md").write_text(card, encoding="utf-8")


if __name__ == "__main__":
    main()
