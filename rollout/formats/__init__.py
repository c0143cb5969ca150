"""How messages become token ids and back: DeepSeek-V3.2's format, a checkpoint's own template."""
