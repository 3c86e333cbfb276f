"""Conditions beyond the prompt: control images and the networks that read them."""
