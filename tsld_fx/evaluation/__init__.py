"""Task scores of a model with lm_eval: what `tsld-fx evaluate` is made of."""
