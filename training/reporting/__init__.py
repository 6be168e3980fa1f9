"""The outputs of a run: terminal, ``metrics.jsonl``, TensorBoard events, plots."""
