"""Why a low-bit student errs: by token position, by depth, by the teacher's confidence, over epochs."""

from tsld_fx.analysis.activations import Activations, attention_maps, decoder_layers, run
from tsld_fx.analysis.curves import LossCurves, read_curves
from tsld_fx.analysis.errors_by_place import PlaceErrors, errors_by_place
from tsld_fx.analysis.report import Analysis, analyze, write_report
from tsld_fx.analysis.tokens import TokenTable, token_table

__all__ = [
    "Activations",
    "Analysis",
    "LossCurves",
    "PlaceErrors",
    "TokenTable",
    "analyze",
    "attention_maps",
    "decoder_layers",
    "errors_by_place",
    "read_curves",
    "run",
    "token_table",
    "write_report",
]
