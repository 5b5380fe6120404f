"""What evolution left of a model's language: lm-evaluation-harness over the engine."""
