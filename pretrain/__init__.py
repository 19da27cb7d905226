"""Pretrain Vision Transformers on sharded images under DeepSpeed ZeRO."""

import os

# Threads of OpenMP otherwise spin while they wait for each other, and a step takes ten times as long where other work
# wants the same cores. OpenMP reads the variable when torch is imported, so every entry point must come by here first.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

__version__ = "0.1.0"
