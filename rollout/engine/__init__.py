"""vLLM: one engine, the actors that hold many, what they record, their weights, the DSA model."""
