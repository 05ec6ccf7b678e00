"""Run lm_eval's tasks on a model: full-precision, prepared or packed."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from tsld_fx.capture import max_positions
from tsld_fx.errors import ConfigError, DataError
from tsld_fx.evaluation.tasks import chance_level, leaves, load_tasks, task_manager

logger = logging.getLogger(__name__)
_NEW_TOKENS = 256  # lm_eval's own default for tasks that generate


def check_options(limit: int | None, shots: int | None, batch_size: int, max_new_tokens: int | None) -> None:
    """Refuse numbers that no run can have.

    Raises:
        ConfigError: it names the option.
    """
    for option, value, least in (
        ("--limit", limit, 1), ("--shots", shots, 0), ("--batch-size", batch_size, 1),
        ("--max-new-tokens", max_new_tokens, 1),
    ):  # fmt: skip
        if value is not None and value < least:
            raise ConfigError(f"evaluate: {option} {value}: give at least {least}.")


def run_tasks(
    model: PreTrainedModel,
    tokenizer: Any,
    tasks: dict[str, Any],
    *,
    limit: int | None = None,
    shots: int | None = None,
    batch_size: int = 8,
    max_new_tokens: int | None = None,
) -> dict[str, Any]:
    """Score a model with lm_eval on tasks that `load_tasks` gave.

    Args:
        model: any causal language model on any device, in eval mode.
        limit: score only the first samples of each task.
        shots: examples in the prompt; None for each task's own number.
        max_new_tokens: for tasks that generate; None for each task's own number (256 where it says none).

    Returns:
        `scores`: one dict per task and metric with task, metric, filter, value, stderr, chance, samples, shots
        (value and chance between 0 and 1, stderr None where lm_eval has none); `truncated`: prompts that were cut on
        the left to fit the model; `seconds`; `lm_eval`: its version.

    Raises:
        TsldError: options that do not fit the model or the tasks, or a failure inside lm_eval.
    """
    check_options(limit, shots, batch_size, max_new_tokens)
    _check_room(model, leaves(tasks), max_new_tokens)
    import lm_eval

    harness, start = _language_model(model, tokenizer, batch_size), time.perf_counter()
    quiet = [logging.getLogger(name) for name in ("lm_eval", "lm-eval")]
    for one in quiet:
        one.setLevel(logging.ERROR)
    try:
        results: Any = lm_eval.simple_evaluate(
            model=harness,
            tasks=list(tasks.values()),
            num_fewshot=shots,
            batch_size=batch_size,
            limit=limit,
            bootstrap_iters=1000,
            log_samples=False,
            task_manager=task_manager(),  # without it lm_eval reads its thousands of files once more
            gen_kwargs=None if max_new_tokens is None else {"max_gen_toks": max_new_tokens},
        )
    except (ValueError, KeyError, AssertionError, IndexError, RuntimeError) as error:
        first = (str(error).splitlines() or [type(error).__name__])[0]
        raise DataError(
            f"evaluate: lm_eval failed on {', '.join(tasks)} ({type(error).__name__}: {first[:300]}). "
            "Check that the data and the model fit the tasks; --traceback shows where it happened."
        ) from error
    if harness.truncated:
        logger.warning(
            "evaluate: %d prompts were longer than the model's %d positions and lost their beginning. "
            "Lower --shots, or take the scores as those of shortened prompts.",
            harness.truncated, harness.max_length,
        )  # fmt: skip
    return {
        "scores": _scores(results, leaves(tasks), limit),
        "truncated": harness.truncated,
        "seconds": round(time.perf_counter() - start, 1),
        "lm_eval": version("lm_eval"),
    }


def evaluate(
    model: PreTrainedModel, tokenizer: Any, names: Sequence[str], *, data: Path | None = None, **options: Any
) -> dict[str, Any]:
    """`load_tasks` and `run_tasks` in one call."""
    numbers = {"limit": None, "shots": None, "batch_size": 8, "max_new_tokens": None} | options
    check_options(**numbers)
    return run_tasks(model, tokenizer, load_tasks(names, data), **options)


def _check_room(model: PreTrainedModel, tasks: dict[str, Any], max_new_tokens: int | None) -> None:
    positions = max_positions(model)
    for name, task in tasks.items():
        if task.OUTPUT_TYPE != "generate_until" or positions is None:
            continue
        wanted = max_new_tokens or (task.config.generation_kwargs or {}).get("max_gen_toks", _NEW_TOKENS)
        if wanted >= positions:
            raise ConfigError(
                f"task {name!r} generates up to {wanted} tokens, but the model has {positions} positions for prompt "
                f"and answer together. Give --max-new-tokens, fewer than {positions}."
            )


def _language_model(model: PreTrainedModel, tokenizer: Any, batch_size: int) -> Any:
    """lm_eval's wrapper of a transformers model, which also counts the prompts that it has to cut."""
    from lm_eval.models.huggingface import HFLM

    class Wrapped(HFLM):
        truncated = 0

        def _loglikelihood_tokens(self, requests: Any, *args: Any, **kwargs: Any) -> Any:
            room = self.max_length + 1  # the last token is only predicted
            self.truncated += sum(len(context) + len(answer) > room for _, context, answer in requests)
            return super()._loglikelihood_tokens(requests, *args, **kwargs)

        def generate_until(self, requests: Any, *args: Any, **kwargs: Any) -> Any:
            for request in requests:
                prompt, options = request.args
                room = self.max_length - options.get("max_gen_toks", self.max_gen_toks)
                self.truncated += len(self.tok_encode(prompt)) > room
            return super().generate_until(requests, *args, **kwargs)

    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    return Wrapped(pretrained=model, tokenizer=tokenizer, batch_size=batch_size, backend="causal")


def _scores(results: Any, tasks: dict[str, Any], limit: int | None) -> list[dict[str, Any]]:
    """lm_eval's `metric,filter` keys as rows, groups after their tasks."""
    rows = []
    table = {**results["results"], **(results.get("groups") or {})}
    for name, values in table.items():
        for key, value in values.items():
            metric, comma, kind = key.partition(",")
            if not comma or metric.endswith("_stderr") or not isinstance(value, int | float):
                continue
            error = values.get(f"{metric}_stderr,{kind}")
            counts = results["n-samples"].get(name, {})
            rows.append(
                {
                    "task": name,
                    "metric": metric,
                    "filter": None if kind == "none" else kind,
                    "value": float(value),
                    "stderr": float(error) if isinstance(error, int | float) else None,
                    "chance": chance_level(tasks[name], metric, limit) if name in tasks else None,
                    "samples": counts.get("effective"),
                    "shots": results["n-shot"].get(name),
                }
            )
    return rows
