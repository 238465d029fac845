"""Scores: how much the model, or one of its behaviors, relies on each unit. One method a file.

On text: `fisher` (prices), `ablation` (exact). On behaviors, all in the sign of `results`: `gradients` (integrated over
inputs: the default), `activations`, `attribution` (one gradient: a prefilter), `patching` and `path` (exact),
`rounded` (exact, by format), `direct` (logit attribution), `ability` (can the model do it at all).
"""
