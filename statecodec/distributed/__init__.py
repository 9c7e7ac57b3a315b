"""Checkpoints and optimizer states of many processes."""
