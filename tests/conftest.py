"""Settings that all tests share."""

from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch
from hypothesis import settings
from transformers.utils import logging as transformers_logging

from tests.captures import remember_captures

settings.register_profile("tsld_fx", deadline=None, max_examples=40, derandomize=True)
settings.load_profile("tsld_fx")
transformers_logging.set_verbosity_error()
transformers_logging.disable_progress_bar()
remember_captures()


def pytest_configure(config: pytest.Config) -> None:
    if "PYTEST_XDIST_WORKER" in os.environ:
        torch.set_num_threads(1)  # workers share the cores


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    for item in items:  # one worker per model family: `tests.models` captures each family once per process
        family = getattr(item, "callspec", None) and item.callspec.params.get("family")
        if family:
            item.add_marker(pytest.mark.xdist_group(str(family)))
    if torch.cuda.is_available():
        return
    wanted = [item for item in items if item.get_closest_marker("gpu") is None]
    if len(wanted) < len(items):
        config.hook.pytest_deselected(items=[item for item in items if item.get_closest_marker("gpu")])
        items[:] = wanted


@pytest.fixture(autouse=True)
def _same_state_for_every_test() -> None:
    torch.manual_seed(0)
    assert torch.is_grad_enabled(), "an earlier test left grad mode off"
