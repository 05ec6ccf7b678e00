"""Perplexity against a plain float64 loop over windows, as a function and through `tsld-fx eval`."""

from __future__ import annotations

import math
import re
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.models import build, ids
from tests.tiny_runs import BLOCK, float_folder, run_cli, text_file, tokenizer
from tsld_fx.errors import DataError
from tsld_fx.perplexity import perplexity
from tsld_fx.text_data import tokenize


def oracle(model: torch.nn.Module, tokens: Tensor, length: int, stride: int | None) -> tuple[float, int]:
    """exp of the mean loss, window by window, token by token; and how many tokens were scored."""
    total, count, seen = 0.0, 0, 0
    for start in range(0, len(tokens), stride or length):
        window = tokens[start : start + length]
        with torch.no_grad():
            log_probs = model(input_ids=window[None]).logits[0].double().log_softmax(-1)
        for position in range(1, len(window)):
            if stride is None or start + position >= seen:
                total -= float(log_probs[position - 1, window[position]])
                count += 1
        seen = start + len(window)
        if stride is not None and seen >= len(tokens):
            break
    return math.exp(total / count), count


@pytest.mark.parametrize("count", [2, 15, 16, 17, 49, 100])
@pytest.mark.parametrize("stride", [None, 1, 5, 16])
def test_windows_match_the_loop(count: int, stride: int | None) -> None:
    model, tokens = build("llama"), ids(1, count)[0]
    expected, scored = oracle(model, tokens, 16, stride)
    found = perplexity(model, tokens, 16, stride=stride, batch_size=3)
    assert found.tokens == scored
    assert found.perplexity == pytest.approx(expected, rel=1e-5)
    assert math.exp(found.loss) == pytest.approx(found.perplexity)
    if stride is not None and stride < 16:
        assert scored == count - 1


def test_strided_windows_differ_from_windows_without_overlap() -> None:
    model, tokens = build("llama"), ids(1, 100)[0]
    plain, strided = perplexity(model, tokens, 16), perplexity(model, tokens, 16, stride=4)
    assert abs(plain.loss - strided.loss) > 1e-4
    assert (plain.tokens, strided.tokens) == (93, 99)


def test_mode_of_the_model_is_put_back_and_dropout_is_off() -> None:
    model, tokens = build("gpt2").train(), ids(1, 40)[0]
    first, second = perplexity(model, tokens, 16), perplexity(model, tokens, 16)
    assert first == second
    assert model.training


@pytest.mark.parametrize(
    ("tokens", "options", "message"),
    [
        (ids(1, 1)[0], {}, "at least two tokens, got 1"),
        (ids(1, 9)[0], {"stride": 0}, "stride=0 must be between 1 and the window's length 8"),
        (ids(1, 9)[0], {"stride": 9}, "stride=9"),
        (ids(1, 9), {}, r"one stream of token numbers \[N\], got \[1, 9\]"),
        (ids(1, 9)[0].float(), {}, "token numbers are int64"),
        (ids(1, 9)[0], {"batch_size": 0}, "batch_size=0 must be at least 1"),
        (ids(1, 9)[0] + 97, {}, "outside the model's vocabulary of 97 tokens"),
    ],
)
def test_refused(tokens: Tensor, options: dict[str, int], message: str) -> None:
    with pytest.raises(DataError, match=message):
        perplexity(build("llama"), tokens, 8, **options)
    with pytest.raises(DataError, match="at least 2 tokens"):
        perplexity(build("llama"), tokens, 1)


@pytest.mark.parametrize("stride", [None, 4])
def test_eval_command_prints_the_oracles_figures(stride: int | None) -> None:
    from tsld_fx.model_folders import load_float

    text = Path(text_file("test")).read_text()
    expected, scored = oracle(load_float(str(float_folder())).eval(), tokenize([text], tokenizer()), BLOCK, stride)
    words = ["eval", float_folder(), "--text", text_file("test"), "--length", BLOCK]
    outcome = run_cli(*words, *([] if stride is None else ["--stride", stride]))
    assert outcome.code == 0, outcome.err
    found = re.search(r"perplexity ([\d.]+) +loss ([\d.]+) nats +(\d+) tokens scored", outcome.out)
    assert found is not None, outcome.out
    assert float(found[1]) == pytest.approx(expected, rel=1e-5)
    assert int(found[3]) == scored
    assert ("without overlap" in outcome.out) == (stride is None)
