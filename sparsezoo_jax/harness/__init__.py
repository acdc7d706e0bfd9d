"""Benchmarks by lm-evaluation-harness: scores of texts (`scorer`), and the model that it calls (`model`)."""
