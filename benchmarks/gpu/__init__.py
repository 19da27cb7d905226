"""Prove on a machine with NVIDIA GPUs what the tests can only count on a CPU; `make gpu` runs all of it."""
