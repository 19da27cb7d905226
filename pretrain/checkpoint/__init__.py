"""Checkpoints: whole or invisible."""
