"""What happens before the first minute: where the model lies, settings that follow from it, every check."""
