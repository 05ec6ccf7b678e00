"""`tsld-fx demo`: a real decoder becomes ternary, keeps its perplexity and speaks, in five minutes on two cores."""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from tsld_fx.config import QuantConfig
from tsld_fx.errors import CheckpointError, ConfigError, TrainingError
from tsld_fx.inspection import float32_bytes, layer_table, packed_bytes, weights_equal
from tsld_fx.losses import ground_truth, token_scaled_logit_distillation
from tsld_fx.lowered import convert
from tsld_fx.model_folders import load_float, load_tokenizer
from tsld_fx.perplexity import perplexity
from tsld_fx.plots import plot_bars
from tsld_fx.preparation import load_prepared, prepare
from tsld_fx.prepared import PreparedModel
from tsld_fx.recipes import train
from tsld_fx.settings import DataSettings, RunSettings, read_yaml
from tsld_fx.text_data import DEMO, read_documents, tokenize
from tsld_fx.whole_files import whole_folder, write_json

BLOCK = 256  # tokens
BATCH = 8  # sequences per step
RATE = 1e-3  # the peak learning rate
FULL_STEPS = 1000
OVERHEAD = 1.2  # evaluations, checkpoints and the trainer's own work, as a factor on the bare step
PROMPTS = ("Return a new list", "class Path(object):\n", "The exception raised when")
Say = Callable[[str], None]


@dataclass(frozen=True)
class Pace:
    """Seconds per training step in each precision, measured on this machine before the run."""

    float32: float
    bfloat16: float

    @property
    def best(self) -> float:
        """Seconds per step in the faster one."""
        return min(self.float32, self.bfloat16)


def measure_pace() -> Pace:
    """Time training steps on a throw-away student, in float32 and under bfloat16 autocast."""
    teacher, student = load_float(DEMO).eval(), prepare(load_float(DEMO)).train()
    ids = torch.randint(0, student.config.vocab_size, (BATCH, BLOCK))
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-6)

    def seconds(autocast: bool) -> float:
        taken = []
        for _ in range(6):
            start = time.perf_counter()
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                with torch.no_grad():
                    target = teacher(ids, use_cache=False).logits
                logits = student(ids).logits
                loss = token_scaled_logit_distillation(logits, target, ids) + ground_truth(logits, ids)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            taken.append(time.perf_counter() - start)
        return statistics.median(taken[1:])

    return Pace(seconds(False), seconds(True))


def settings_for(pace: Pace, minutes: float, full: bool) -> RunSettings:
    """The demo's run: as many steps as fit into `minutes` at this pace, or FULL_STEPS."""
    steps = FULL_STEPS if full else max(30, min(FULL_STEPS, int(minutes * 60 / (OVERHEAD * pace.best))))
    training = {
        "max_steps": steps,
        "per_device_train_batch_size": BATCH,
        "learning_rate": RATE,
        "lr_scheduler_type": "cosine",
        "warmup_steps": min(50, steps // 10),
        "eval_strategy": "steps",
        "eval_steps": max(10, -(-steps // (8 if full else 4))),
        "bf16": pace.bfloat16 < pace.float32,
        "use_cpu": True,
    }
    return RunSettings(DEMO, data=DataSettings(block_size=BLOCK), training=training, checkpoint_steps=100)


def run_demo(out: str | Path, *, full: bool = False, minutes: float = 2.5, say: Say = print) -> dict[str, Any]:
    """Evaluate, quantise without training, train with TSLD, convert, check, generate and report.

    Args:
        out: the run's folder; the same call resumes a demo that was stopped.
        full: train FULL_STEPS steps instead of for `minutes`.
        minutes: training time to aim at.
        say: receives one line per stage.

    Returns:
        The content of `out`/report.json.

    Raises:
        ConfigError: no time to train.
        TrainingError: a packed weight differs from the trained one.
        CheckpointError: `full` on the folder of a short demo.
    """
    if not minutes > 0:
        raise ConfigError(f"demo: minutes={minutes} must be more than 0.")
    out, start = Path(out), time.perf_counter()
    record = out / "train" / "run.yaml"
    if record.is_file():
        recorded = read_yaml(record)
        recorded.pop("command", None)
        settings = RunSettings.from_dict(recorded)
        if full and settings.training["max_steps"] < FULL_STEPS:
            raise CheckpointError(
                f"{out}: this folder holds a demo of {settings.training['max_steps']} steps. "
                "Choose another output folder for the full one."
            )
        say(f"resuming the demo in {out}")
    else:
        say("measuring this machine's training speed")
        settings = settings_for(measure_pace(), minutes, full)
    precision = "bfloat16 autocast" if settings.training["bf16"] else "float32"
    say(f"training: {settings.training['max_steps']} steps of {BATCH} x {BLOCK} tokens in {precision}")
    result = train(settings, out / "train")
    say("converting to packed 2-bit weights")
    prepared = load_prepared(out / "train" / "model")
    lowered, tokenizer = convert(prepared), load_tokenizer(DEMO)
    report = _report(result, prepared, lowered, tokenizer, settings.quant)
    with whole_folder(out / "packed") as target:
        lowered.save_pretrained(target)
        tokenizer.save_pretrained(target)
    report["seconds"] = round(time.perf_counter() - start, 1)
    report["settings"] = settings.to_dict()
    bars = {name: report["perplexity"][name] for name in ("full precision", "ternary, no training", "ternary, TSLD")}
    plot_bars(bars, out / "perplexity.png", "validation perplexity")
    write_json(out / "report.json", report)
    return report


def _report(
    result: dict[str, Any],
    prepared: PreparedModel,
    lowered: PreTrainedModel,
    tokenizer: Any,
    quant: QuantConfig,
) -> dict[str, Any]:
    if not weights_equal(prepared, lowered):
        raise TrainingError("demo: a packed weight differs from the trained one; please report this as a bug.")
    tokens = tokenize(read_documents(DEMO, "validation"), tokenizer)[: 16 * BLOCK]
    trained, packed = (perplexity(m, tokens, BLOCK).perplexity for m in (prepared.eval(), lowered))
    rows = layer_table(lowered)
    teacher, ptq = result["teacher"]["validation"], result["ptq"]["validation"]
    student = result["student"]["validation"]
    return {
        "perplexity": {"full precision": teacher, "ternary, no training": ptq, "ternary, TSLD": student},
        "gap_closed": (ptq - student) / (ptq - teacher),
        "packed_equals_trained": True,
        "slice": {"trained": trained, "packed": packed},
        "bytes": {"float32": float32_bytes(rows), "packed": packed_bytes(rows)},
        "zeros": sum(r.zeros * r.shape[0] * r.shape[1] for r in rows if r.bits == 2)
        / sum(r.shape[0] * r.shape[1] for r in rows if r.bits == 2),
        "steps": result["steps"],
        "train_seconds": result["seconds"],
        "samples": {prompt: _continue(lowered, tokenizer, prompt) for prompt in PROMPTS},
    }


def _continue(model: PreTrainedModel, tokenizer: Any, prompt: str) -> str:
    inputs = tokenizer(prompt, return_tensors="pt")
    config = copy.deepcopy(model.generation_config)
    config.update(max_new_tokens=32, do_sample=False, repetition_penalty=1.2, pad_token_id=tokenizer.eos_token_id)
    made = model.generate(
        input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], generation_config=config
    )
    return str(tokenizer.decode(made[0], skip_special_tokens=True))
