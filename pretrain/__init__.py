"""Pretrain Vision Transformers on sharded images under DeepSpeed ZeRO."""

__version__ = "0.1.0"
