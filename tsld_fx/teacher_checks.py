"""Whether a model can teach a student."""

from __future__ import annotations

from transformers import PreTrainedModel

from tsld_fx.errors import TrainingError


def check_teacher(teacher: object, student: PreTrainedModel) -> None:
    """Refuse a teacher that is missing, is the student, or speaks another vocabulary.

    Raises:
        TrainingError: it says which.
    """
    if not isinstance(teacher, PreTrainedModel):
        raise TrainingError(
            f"TSLDTrainer: this method needs a teacher, got {type(teacher).__name__}. Give the full-precision model "
            "as teacher=, or use DistillConfig(method='gt')."
        )
    ours = {p.untyped_storage().data_ptr() for p in student.parameters() if p.numel() and not p.is_meta}
    shared = next((n for n, p in teacher.named_parameters() if p.untyped_storage().data_ptr() in ours), None)
    if shared is not None:
        raise TrainingError(
            f"TSLDTrainer: the teacher shares storage with the student ('{shared}'), so it would change while the "
            "student trains. Load the teacher a second time, or pass copy.deepcopy(model) taken before prepare."
        )
    theirs = teacher.config.get_text_config().vocab_size
    if theirs != student.config.get_text_config().vocab_size:
        raise TrainingError(
            f"TSLDTrainer: the teacher's vocabulary has {theirs} tokens, the student's "
            f"{student.config.get_text_config().vocab_size}. Both must use one tokenizer."
        )
