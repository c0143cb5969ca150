"""What a run costs: sizes and FLOPs of a model, bytes on a GPU, seconds by phase, what to change first."""
