"""Every error that tsld_fx raises on purpose. Each message says what is wrong, where, and how to mend it."""

from __future__ import annotations


class TsldError(Exception):
    """Base of all errors raised on purpose; the command line prints its text and exits with code 2."""


class ConfigError(TsldError):
    """A configuration that contradicts itself or the model."""


class CaptureError(TsldError):
    """A model that `torch.export` cannot turn into one decoder graph."""


class PassError(TsldError):
    """A pass met a graph that it cannot transform."""


class DataError(TsldError):
    """Text, labels or masks that cannot be trained or evaluated on."""


class TrainingError(TsldError):
    """Training cannot go on (NaN, Inf, a teacher that does not fit the student)."""


class CheckpointError(TsldError):
    """A checkpoint or a run folder that is cut short, of another version, or of another run."""


class BackendError(TsldError):
    """A backend that is unknown or cannot run here."""


class AnalysisError(TsldError):
    """Models or run folders that cannot be analysed."""


class ExportError(TsldError):
    """A model or a target that cannot be exported, or an exported file that does not do what the model does."""
