"""Metrics go to a local file first; MLflow is fed from it by a process of its own."""
