"""The DeepSeek-V3.2 policy inside vLLM: its layers, their modules, attention over the paged cache."""
