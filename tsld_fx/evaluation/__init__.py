"""Task scores of a model with lm_eval: `tsld-fx evaluate`."""
