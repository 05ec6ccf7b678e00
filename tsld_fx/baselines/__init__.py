"""What TSLD is compared with: quantisation without training, on calibration text."""

from tsld_fx.baselines.awq import awq_weight
from tsld_fx.baselines.gptq import gptq_weight
from tsld_fx.baselines.post_training import gptq, simulate

__all__ = ["awq_weight", "gptq", "gptq_weight", "simulate"]
