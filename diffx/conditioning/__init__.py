"""Conditions beyond the prompt in ordinary pipelines."""
