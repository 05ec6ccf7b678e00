"""Scoring of generated answers in the task table."""

import sys
from pathlib import Path

import torch

from tests.models import UNQUANTISED, build
from tsld_fx import prepare
from tsld_fx.task_data import Example

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))
from task_table import exact_match, last_number


class Words:
    """A tokenizer of numbers."""

    eos_token_id = 2

    def __call__(self, text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
        return {"input_ids": [int(word) for word in text.split()]}

    def decode(self, ids: list[int]) -> str:
        return " ".join(map(str, ids))


def test_the_last_number_of_an_answer() -> None:
    assert last_number("3 apples and 4 make\n#### 1,007.") == "1007"
    assert last_number("so -2.5 in all") == "-2.5"
    assert last_number("none") is None


def test_prompts_of_several_lengths_grow_as_each_would_alone() -> None:
    model = prepare(build("llama"), UNQUANTISED).eval()
    prompts = ["5 9 33", "71", "14 15 8 40 62 7"]
    examples, numbers = [], set()
    for prompt in prompts:
        ids = torch.tensor([Words()(prompt)["input_ids"]])
        for _ in range(6):
            ids = torch.cat([ids, model(input_ids=ids).logits[:, -1:].argmax(-1)], 1)
        made = ids[0, len(prompt.split()) :].tolist()
        made = made[: made.index(2)] if 2 in made else made
        numbers.add(str(made[-1]) if made else None)
        examples.append(Example(prompt, str(made[-1]) if made else "none"))
    assert len(numbers) > 1
    assert exact_match(model, examples, Words(), 6) == 1.0
    wrong = [Example(examples[0].prompt, "-1"), *examples[1:]]
    assert exact_match(model, wrong, Words(), 6) == 2 / 3
