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
import json
import lzma
import math
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import AttentionInterface, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
from transformers.integrations.sdpa_attention import sdpa_attention_forward

END = "<|endoftext|>"  # id 0: before, between and after documents
VOCABULARY = 2048
WINDOW = 512  # tokens of context in training
Splits = dict[str, dict[str, str]]  # split -> document name -> text


@dataclass(frozen=True)
class Recipe:
    """How to train: AdamW on random windows, with warm-up and a cosine to zero."""

    rate: float
    batch: int = 32  # windows per step
    epochs: int = 0  # 0: until the time is over
    dropout: float = 0.0  # on the embedding and on what each attention and MLP block adds
    decay: float = 0.1
    warmup: float = 0.02  # share of the run

    def rate_at(self, done: float) -> float:
        """Learning rate when the share `done` (0 to 1) of the run is over."""
        return self.rate * min(done / self.warmup, 1.0) * 0.5 * (1 + math.cos(math.pi * done))


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


# --- data


def read_splits(path: Path | None) -> Splits:
    """The demo's documents by split; from `path` if it exists, else from this Python's library."""
    if path and path.exists():
        return json.loads(path.read_text(encoding="utf-8"))
    from tsld_fx.demo.text import load_splits

    splits = {split: {d.name: d.text for d in documents} for split, documents in load_splits().items()}
    if path:
        path.write_text(json.dumps(splits, ensure_ascii=False, indent=0), encoding="utf-8")
    return splits


def read_books(corpus: Path) -> list[str]:
    with (lzma.open if corpus.suffix == ".xz" else open)(corpus, "rt", encoding="utf-8") as file:
        return [book.strip() for book in file.read().split(END)]


def encode(tokenizer: Tokenizer, texts: list[str]) -> np.ndarray:
    """(n,) int64: END before each text and after the last."""
    ids = chain.from_iterable([0, *encoding.ids] for encoding in tokenizer.encode_batch_fast(texts))
    return np.fromiter(chain(ids, [0]), dtype=np.int64)


def read_tokens(args: argparse.Namespace) -> tuple[Tensor, Tensor]:
    """The novels as (n,) int64 on the device, and the last one, held out, as (m,) int64."""
    if args.tokens and args.tokens.exists():
        stored = np.load(args.tokens)
        train, held_out = stored["train"], stored["held_out"]
    else:
        tokenizer, books = load_tokenizer(args.out), read_books(args.corpus)
        train, held_out = (encode(tokenizer, part).astype(np.uint16) for part in (books[:-1], books[-1:]))
        if args.tokens:
            np.savez_compressed(args.tokens, train=train, held_out=held_out)
    print(f"novels: {len(train):,} tokens, and {len(held_out):,} held out", flush=True)
    train, held_out = (torch.from_numpy(part.astype(np.int64)).to(args.device) for part in (train, held_out))
    return train, held_out


@contextmanager
def whole_files(folder: Path) -> Iterator[Path]:
    """A scratch folder; what it holds at the end moves into `folder`, each file whole or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".partial-") as scratch:
        yield Path(scratch)
        for path in sorted(Path(scratch).iterdir()):
            path.chmod(0o644)
            os.replace(path, folder / path.name)


# --- tokenizer


def make_tokenizer(out: Path, documents: dict[str, str], books: list[str]) -> None:
    """Trains on all train documents and, from the middle of each book, 40 % as many characters in all."""
    share = int(0.4 * sum(map(len, documents.values())) / len(books))
    slices = [book[len(book) // 2 :][:share] for book in books]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=VOCABULARY, special_tokens=[END], initial_alphabet=alphabet)
    tokenizer.train_from_iterator([*documents.values(), *slices], trainer)
    settings = {
        "backend": "tokenizers",
        "bos_token": END,
        "clean_up_tokenization_spaces": False,
        "eos_token": END,
        "model_max_length": 512,
        "tokenizer_class": "TokenizersBackend",
    }
    with whole_files(out) as scratch:
        tokenizer.save(str(scratch / "tokenizer.json"))
        (scratch / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")
    for name, text in (("documents", "\n".join(documents.values())), ("novels", "\n".join(slices))):
        ids = tokenizer.encode(text).ids
        assert tokenizer.decode(ids, skip_special_tokens=False) == text, name
        print(f"tokenizer: {len(text.encode()) / len(ids):.2f} bytes per token of {name}", flush=True)


def load_tokenizer(folder: Path) -> Tokenizer:
    return Tokenizer.from_file(str(folder / "tokenizer.json"))


# --- training


def build_model(device: torch.device) -> LlamaForCausalLM:
    """3,475,712 parameters in fp32; the embedding is also the output layer."""
    # An attention of this name is given no mask. For others transformers looks whether they need one, and so
    # waits for the device, which a CUDA graph cannot do.
    AttentionInterface.register("plain_causal", sdpa_attention_forward)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=256,
        intermediate_size=704,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=0,
        attn_implementation="plain_causal",
    )
    return LlamaForCausalLM(config).to(device)


class Stepper:
    """One optimizer step on random windows of `data` (n,), replayed as a CUDA graph on a GPU: a model so
    small would otherwise wait for the launches of its kernels."""

    def __init__(self, model: LlamaForCausalLM, data: Tensor, recipe: Recipe, cuda_graph: bool) -> None:
        self.model, self.data, self.recipe = model.train(), data, recipe
        self.rate = torch.zeros((), device=data.device)
        matrices = {"params": [p for p in model.parameters() if p.ndim > 1], "weight_decay": recipe.decay}
        vectors = {"params": [p for p in model.parameters() if p.ndim == 1], "weight_decay": 0.0}
        self.optimizer = torch.optim.AdamW(
            [matrices, vectors], lr=self.rate, betas=(0.9, 0.95), fused=True, capturable=data.is_cuda
        )
        self.run: Callable[[], None] = self._step
        if cuda_graph:
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                for _ in range(3):  # at rate 0: allocates, changes no weight
                    self._step()
            torch.cuda.current_stream().wait_stream(side)
            self.optimizer.zero_grad(set_to_none=True)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                self._step()
            self.run = graph.replay

    def _step(self) -> None:
        starts = torch.randint(len(self.data) - WINDOW, (self.recipe.batch, 1), device=self.data.device)
        windows = self.data[starts + torch.arange(WINDOW + 1, device=self.data.device)]
        self.optimizer.zero_grad(set_to_none=True)
        with torch.autocast(self.data.device.type, dtype=torch.bfloat16, cache_enabled=False):
            logits = self.model(input_ids=windows[:, :-1], use_cache=False).logits
        loss = F.cross_entropy(logits.float().flatten(0, 1), windows[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.loss = loss.detach()

    def train(self, done: Callable[[int], float], every: int, report: Callable[[int], None]) -> None:
        """Steps until `done(step)` reaches 1; calls `report(step)` every `every` steps and at the end."""
        step = 0
        while (share := done(step)) < 1:
            self.rate.fill_(self.recipe.rate_at(share))
            self.run()
            step += 1
            if step % every == 0:
                report(step)
            elif step % 20 == 0 and self.data.is_cuda:
                torch.cuda.synchronize()  # lest the clock run ahead of the device
        if step % every:
            report(step)


@torch.inference_mode()
def evaluate(model: LlamaForCausalLM, tokens: Tensor, window: int = WINDOW) -> float:
    """Nats per token of `tokens` (n,) in fp32; windows do not overlap, each token but the first counts."""
    was_training = model.training
    model.eval()
    rows = math.ceil((len(tokens) - 1) / window)
    padding = (0, rows * window - len(tokens) + 1)
    inputs = F.pad(tokens[:-1], padding).view(rows, window)
    labels = F.pad(tokens[1:], padding, value=-100).view(rows, window)
    total = 0.0
    for some_inputs, some_labels in zip(inputs.split(64), labels.split(64), strict=True):
        logits = model(input_ids=some_inputs, use_cache=False).logits
        total += F.cross_entropy(logits.flatten(0, 1), some_labels.flatten(), reduction="sum").item()
    model.train(was_training)
    return total / (len(tokens) - 1)


def save_checkpoint(path: Path, model: LlamaForCausalLM, notes: dict[str, str]) -> None:
    """fp16 weights without the tied copy, and what the model card tells of them."""
    state = {key: value.half().cpu() for key, value in model.state_dict().items() if key != "lm_head.weight"}
    with whole_files(path.parent) as scratch:
        save_file(state, scratch / path.name, metadata=notes)


def load_checkpoint(path: Path, device: torch.device) -> tuple[LlamaForCausalLM, dict[str, str]]:
    model = build_model(device)
    with safe_open(path, "pt") as file:
        model.load_state_dict({key: file.get_tensor(key) for key in file.keys()}, strict=False)  # noqa: SIM118
        return model, file.metadata()


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
