"""`tsld-fx` whose data-parallel training goes wrong on process 1 at step 3, by `nan` or `raise` (TSLD_TEST_BREAKS)."""

from __future__ import annotations

import os
from typing import Any

from torch import Tensor

from tsld_fx import trainer
from tsld_fx.cli.main import main

plain = trainer.TSLDTrainer._fused_loss


def spoilt(self: trainer.TSLDTrainer, *given: Any) -> Tensor:
    """The loss, or what is to go wrong with it."""
    loss = plain(self, *given)
    if os.environ["RANK"] != "1" or self.state.global_step < 3:
        return loss
    if os.environ["TSLD_TEST_BREAKS"] == "raise":
        raise RuntimeError("out of coffee")
    return loss * float("nan")


if __name__ == "__main__":
    trainer.TSLDTrainer._fused_loss = spoilt  # type: ignore[method-assign]
    main()
