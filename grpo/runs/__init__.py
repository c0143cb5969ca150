"""What a run keeps: its folder, checkpoints that a power cut spares, the record of what ran, and every way out."""
