"""Pretrain Vision Transformers on sharded images under DeepSpeed ZeRO."""
