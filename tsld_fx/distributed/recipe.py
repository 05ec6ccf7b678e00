"""A whole run over several processes: the files and the result of `recipes.train`."""

from __future__ import annotations

import logging
import time
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from tsld_fx.distributed.ranks import Ranks
from tsld_fx.distributed.trainer import DistributedTrainer
from tsld_fx.errors import ConfigError
from tsld_fx.plots import plot_run
from tsld_fx.progress import RichProgress
from tsld_fx.recipes import load_run
from tsld_fx.runs import MetricsFile, RunFolder, read_metrics
from tsld_fx.settings import RunSettings
from tsld_fx.task_data import holds_tasks
from tsld_fx.whole_files import whole_folder

logger = logging.getLogger(__name__)


def train_spread(
    settings: RunSettings, out: str | Path, *, quiet: bool = False, callbacks: tuple[TrainerCallback, ...] = ()
) -> dict[str, Any]:
    """Quantisation-aware training over the processes that torchrun started, or one (see `recipes.train`).

    Every process loads the model into the memory of its machine before it is spread.

    Returns:
        The content of result.json on the first process, {} on the others.
    """
    ranks = Ranks.start(bool(settings.training.get("use_cpu", False)))
    bar = RichProgress("training", quiet or not ranks.is_first)
    try:
        folder = ranks.agree(lambda: RunFolder(out, {"command": "train", **settings.to_dict()}))
        if (done := ranks.gather(folder.result() if ranks.is_first else None)[0]) is not None:
            return done if ranks.is_first else {}
        trainer, text, tokenizer = _set_up(settings, folder, ranks, (MetricsFile(folder.metrics), bar, *callbacks))
        known = {name: _evaluate(trainer, text, name == "teacher") for name in ("teacher", "ptq")}
        resume = ranks.gather(folder.resume_point())[0]
        if resume and ranks.is_first:
            logger.warning("resuming from %s", resume)
        start = time.perf_counter()
        state = trainer.train(resume)
        seconds = time.perf_counter() - start
        if trainer.args.load_best_model_at_end:
            trainer.load_best()
        known["student"] = _evaluate(trainer, text)
        model = ranks.agree(trainer.whole_model)
        result = known | {
            "steps": state.global_step,
            "seconds": round(seconds, 1),
            "best_step": state.best_global_step or state.global_step,
        }
        if model is None:
            return {}
        with whole_folder(folder.path / "model") as target:
            model.save_pretrained(target)
            tokenizer.save_pretrained(target)
        plot_run(read_metrics(folder.metrics), folder.path / "plots")
        folder.finish(result)
        return result
    finally:
        bar.stop()
        ranks.stop()


def _set_up(
    settings: RunSettings, folder: RunFolder, ranks: Ranks, callbacks: tuple[TrainerCallback, ...]
) -> tuple[DistributedTrainer, Any, Any]:
    """Load and check everything on every process, begin the folder, and spread the models."""
    assert settings.parallel is not None

    def load() -> tuple[Any, ...]:
        if holds_tasks(settings.data.train):
            raise ConfigError(
                "--parallel fsdp and pipeline train on text in blocks of one length, not on task files. "
                "Use --parallel ddp."
            )
        return load_run(settings, folder)

    arguments, student, teacher, text, tokenizer = ranks.agree(load)
    trainer = DistributedTrainer(
        student,
        teacher,
        arguments,
        text.blocks("train", settings.distill.separate_documents),
        distill=settings.distill,
        parallel=settings.parallel,
        eval_dataset=text.blocks("validation"),
        data_collator=text.collator,
        callbacks=callbacks,
        ranks=ranks,
        keep_teacher=True,
    )
    if ranks.is_first:
        folder.begin()
    ranks.barrier()
    return trainer, text, tokenizer


def _evaluate(trainer: DistributedTrainer, text: Any, of_teacher: bool = False) -> dict[str, float]:
    """Perplexity on validation and test."""
    streams = {split: text.stream(split) for split in ("validation", "test")}
    length = text.settings.data.block_size
    return {
        split: trainer.perplexity(stream, length, of_teacher=of_teacher).perplexity
        for split, stream in streams.items()
        if stream is not None
    }
