"""The policy for training: model families, attention, experts."""
