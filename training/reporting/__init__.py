"""What a run shows and leaves: terminal, ``metrics.jsonl``, TensorBoard events, curves."""
