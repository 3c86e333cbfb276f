"""Conditions beyond the prompt: control images, the networks that read them, and pictures in parts."""
