"""Whole runs: fine-tune a teacher, train a low-bit student, evaluate. The command line is a thin layer over these."""

from __future__ import annotations

import logging
import os
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import EarlyStoppingCallback, PreTrainedModel, TrainerCallback, TrainingArguments

from tsld_fx.distributed.ranks import Alone, Ranks, join
from tsld_fx.errors import ConfigError
from tsld_fx.model_folders import check_window, load_float, load_tokenizer
from tsld_fx.perplexity import check_stream, perplexity
from tsld_fx.plots import plot_run
from tsld_fx.preparation import prepare
from tsld_fx.progress import RichProgress
from tsld_fx.runs import MetricsFile, RunFolder, read_metrics
from tsld_fx.settings import TRAINING_DEFAULTS, RunSettings
from tsld_fx.task_data import holds_tasks
from tsld_fx.task_score import TaskRun
from tsld_fx.text_data import TokenBlocks, read_documents, tokenize
from tsld_fx.trainer import TSLDTrainer, WholeCheckpointTrainer, check_teacher
from tsld_fx.whole_files import whole_folder

logger = logging.getLogger(__name__)


class _Text:
    """The token streams of a run's splits, made on first use."""

    collator = None  # blocks have one length

    def __init__(self, settings: RunSettings, tokenizer: Any) -> None:
        self.settings, self.tokenizer, self._streams = settings, tokenizer, dict[str, Tensor]()

    def stream(self, split: str) -> Tensor | None:
        sources = getattr(self.settings.data, split)
        if not sources:
            return None
        if split not in self._streams:
            self._streams[split] = tokenize(read_documents(sources, split), self.tokenizer)
        return self._streams[split]

    def check(self, model: PreTrainedModel) -> None:
        """Read all of it, so that text that cannot be used is refused before anything is written."""
        for split in ("train", "validation", "test"):
            stream = self.stream(split)
            if stream is not None:
                check_stream(stream, model)
                if split != "test":
                    self.blocks(split)

    def blocks(self, split: str, segments: bool = False) -> TokenBlocks | None:
        stream = self.stream(split)
        end = self.tokenizer.eos_token_id if segments else None
        return None if stream is None else TokenBlocks(stream, self.settings.data.block_size, end)

    def score(self, split: str, model: PreTrainedModel, progress: str | None) -> dict[str, float]:
        """Perplexity in windows of one block that do not overlap."""
        stream = self.stream(split)
        if stream is None:
            return {}
        return {split: perplexity(model, stream, self.settings.data.block_size, progress=progress).perplexity}


def open_data(settings: RunSettings, tokenizer: Any) -> _Text | TaskRun:
    """The text or the task files of a run; nothing is read yet."""
    return (TaskRun if holds_tasks(settings.data.train) else _Text)(settings, tokenizer)


def finetune(settings: RunSettings, out: str | Path, *, patience: int = 2, quiet: bool = False) -> dict[str, Any]:
    """Fine-tune the full-precision model and keep its best validation epoch.

    Args:
        settings: quant and distill are not used.
        out: the run's folder; the same call on the same folder resumes or returns the finished result.
        patience: epochs without a better validation loss before it stops.

    Returns:
        The content of result.json; the model is in `out`/model.

    Raises:
        TsldError: settings, models, text or a folder that cannot be used; nothing is written then.
    """
    if not settings.data.validation:
        raise ConfigError("finetune needs validation text to find the best epoch. Give data.validation.")
    if patience < 1:
        raise ConfigError(f"finetune: patience={patience} must be at least 1 epoch.")
    ranks = join(bool(settings.training.get("use_cpu", False)))
    record = {"command": "finetune", "patience": patience, **settings.to_dict()}
    folder = ranks.agree(lambda: RunFolder(out, record))
    if (done := ranks.agree(folder.result)) is not None:
        return done if is_first() else {}

    def load() -> tuple[Any, ...]:
        arguments = training_arguments(settings, folder, by_epoch=True)
        model, tokenizer = load_float(settings.model), load_tokenizer(settings.model)
        check_window(settings.data.block_size, model)
        text = open_data(settings, tokenizer)
        text.check(model)
        return arguments, model, tokenizer, text

    arguments, model, tokenizer, text = ranks.agree(load)
    if is_first():
        folder.begin()
    quiet = quiet or not is_first()
    before = evaluate(model, text, quiet)
    trainer = WholeCheckpointTrainer(
        model=model,
        args=arguments,
        train_dataset=text.blocks("train"),
        eval_dataset=text.blocks("validation"),
        data_collator=text.collator,
        callbacks=[MetricsFile(folder.metrics), EarlyStoppingCallback(early_stopping_patience=patience)],
    )
    return _run(trainer, model, tokenizer, folder, text, settings, quiet, {"start": before}, ranks)


def train(
    settings: RunSettings,
    out: str | Path,
    *,
    quiet: bool = False,
    callbacks: tuple[TrainerCallback, ...] = (),
) -> dict[str, Any]:
    """Quantisation-aware training of one student against its teacher.

    Args:
        settings: everything about the run.
        out: the run's folder; the same call on the same folder resumes or returns the finished result.

    Returns:
        The content of result.json: perplexities of the teacher, of the student before training (`ptq`) and after
        (`student`), steps and seconds. The trained float model is in `out`/model (`load_prepared`, `convert`).

    Raises:
        TsldError: settings, models, text or a folder that cannot be used; nothing is written then.
    """
    if settings.parallel is not None and settings.parallel.mode != "ddp":
        from tsld_fx.distributed.recipe import train_spread

        return train_spread(settings, out, quiet=quiet, callbacks=callbacks)
    ranks = join(bool(settings.training.get("use_cpu", False)))
    folder = ranks.agree(lambda: RunFolder(out, {"command": "train", **settings.to_dict()}))
    if (done := ranks.agree(folder.result)) is not None:
        return done if is_first() else {}
    quiet = quiet or not is_first()
    arguments, student, teacher, text, tokenizer = ranks.agree(lambda: load_run(settings, folder))
    if is_first():
        folder.begin()
    device = device_of(settings)
    known = {
        "teacher": evaluate(teacher.to(device), text, quiet),
        "ptq": evaluate(student.to(device), text, quiet),
    }
    if arguments.bf16:  # autocast reads it in bfloat16 anyway; half the memory
        teacher = teacher.to(torch.bfloat16)
    trainer = ranks.agree(
        lambda: TSLDTrainer(
            model=student,
            teacher=teacher,
            distill=settings.distill,
            args=arguments,
            train_dataset=text.blocks("train", settings.distill.separate_documents),
            eval_dataset=text.blocks("validation"),
            data_collator=text.collator,
            callbacks=[MetricsFile(folder.metrics), *callbacks],
        )
    )
    return _run(trainer, student, tokenizer, folder, text, settings, quiet, known, ranks)


def load_run(settings: RunSettings, folder: RunFolder) -> tuple[Any, Any, PreTrainedModel, _Text | TaskRun, Any]:
    """-> (TrainingArguments, prepared student, teacher, data, tokenizer); everything is checked before the capture."""
    arguments = training_arguments(settings, folder)
    model, tokenizer = load_float(settings.model), load_tokenizer(settings.model)
    teacher = load_float(settings.teacher or settings.model)
    check_teacher(teacher, model)
    check_window(settings.data.block_size, model)
    text = open_data(settings, tokenizer)
    text.check(model)
    return arguments, prepare(model, settings.quant), teacher, text, tokenizer


def _run(
    trainer: WholeCheckpointTrainer,
    model: PreTrainedModel,
    tokenizer: Any,
    folder: RunFolder,
    text: _Text | TaskRun,
    settings: RunSettings,
    quiet: bool,
    known: dict[str, Any],
    ranks: Ranks | Alone,
) -> dict[str, Any]:
    """Train (from the last whole checkpoint if there is one), save, evaluate, plot and write the result.

    Of several processes the first one writes; the others return {}.
    """
    resume = folder.resume_point()
    if resume and is_first():
        logger.warning("resuming from %s", resume)
    start = time.perf_counter()
    bar = RichProgress("training", quiet).install(trainer)
    try:
        with ranks.guard(leave=False):  # torch hangs now and then when the group is left before DDP's reducer
            trainer.train(resume_from_checkpoint=resume)
    finally:
        bar.stop()
    seconds = time.perf_counter() - start
    trainer.accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=False)  # the result is measured without autocast
    if not is_first():
        return {}
    with whole_folder(folder.path / "model") as target:
        model.save_pretrained(target)
        tokenizer.save_pretrained(target)
    result = known | {
        "student" if "ptq" in known else "model": evaluate(model, text, quiet),
        "steps": trainer.state.global_step,
        "seconds": round(seconds, 1),
        "best_step": trainer.state.best_global_step or trainer.state.global_step,
    }
    plot_run(read_metrics(folder.metrics), folder.path / "plots")
    folder.finish(result)
    return result


def evaluate(model: PreTrainedModel, text: _Text | TaskRun, quiet: bool) -> dict[str, float]:
    """Perplexity on validation and test, with the accuracy where there are choices."""
    found: dict[str, float] = {}
    for split in ("validation", "test"):
        found |= text.score(split, model, None if quiet else f"perplexity ({split})")
    return found


def is_first() -> bool:
    """Whether this is the only process, or the first of those that torchrun started."""
    return os.environ.get("RANK", "0") == "0"


def device_of(settings: RunSettings) -> torch.device:
    """Where a run computes."""
    cpu = settings.training.get("use_cpu", False) or not torch.cuda.is_available()
    return torch.device("cpu") if cpu else torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))


def training_arguments(settings: RunSettings, folder: RunFolder, by_epoch: bool = False) -> TrainingArguments:
    """TrainingArguments of a run.

    Raises:
        ConfigError: a combination of values that transformers refuses.
    """
    values = TRAINING_DEFAULTS | dict(settings.training)
    if not settings.data.validation:
        values["eval_strategy"] = "no"
    best = values["eval_strategy"] != "no" and (by_epoch or settings.keep == "best")
    if best:  # transformers finds the best weights again only where each evaluation has a checkpoint
        values.update(save_strategy=values["eval_strategy"], save_steps=values.get("eval_steps") or 500)
        values.update(load_best_model_at_end=True, metric_for_best_model="eval_loss", greater_is_better=False)
    else:
        values.update(save_strategy="steps", save_steps=settings.checkpoint_steps)
    if by_epoch:  # a resumed run goes on counting the epochs without improvement
        values["restore_callback_states_from_checkpoint"] = True
    values.setdefault("save_total_limit", 2)
    values.setdefault("dataloader_pin_memory", device_of(settings).type == "cuda")
    values.setdefault("disable_tqdm", True)  # RichProgress shows it
    values.setdefault("per_device_eval_batch_size", 8)
    if "RANK" in os.environ and values.get("use_cpu"):
        values.setdefault("ddp_backend", "gloo")
    try:
        return TrainingArguments(output_dir=str(folder.checkpoints), report_to=[], **values)
    except (ValueError, TypeError, ImportError) as error:
        raise ConfigError(f"training: transformers refuses these arguments: {error}. Mend or remove them.") from None
