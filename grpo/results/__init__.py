"""What a run shows: metrics of a step, scores with intervals, expected curves, the live table."""
