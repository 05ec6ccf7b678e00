"""What LowBitGemm says on a machine that cannot run it."""

from __future__ import annotations

import pytest
import torch

from tsld_fx.codegen import LowBitGemm
from tsld_fx.codegen.devices import device_facts
from tsld_fx.errors import BackendError


def layer() -> tuple:
    return torch.zeros(8, 16, dtype=torch.uint8), torch.ones(8, 1), None, 2, 0, 64


def test_no_gpu(monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(BackendError, match="backend='reference'"):
        LowBitGemm.pack(*layer())


def test_device_that_is_not_there(monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(BackendError, match="no cuda:3"):
        LowBitGemm.pack(*layer(), device="cuda:3")
    with pytest.raises(BackendError, match="Pass device='cuda'"):
        LowBitGemm.pack(*layer(), device="cpu")


def test_gpu_that_is_too_old(monkeypatch) -> None:
    class Turing:
        name, major, minor, multi_processor_count = "T4", 7, 5, 40

    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: Turing())
    device_facts.cache_clear()
    with pytest.raises(BackendError, match=r"compute capability 7\.5"):
        device_facts(7)
    device_facts.cache_clear()


def test_no_driver() -> None:
    from tsld_fx.codegen import driver

    try:
        driver.driver_version()
    except BackendError as error:
        assert "NVIDIA driver" in str(error)  # said on a machine without one; with one there is nothing to say
