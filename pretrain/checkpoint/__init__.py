"""Checkpoints: saved while training continues, verified before use, and loaded on any number of ranks.

A checkpoint is a folder with a manifest and one safetensors file per rank. It is written under a temporary name and
renamed last, so every folder that has a checkpoint's name is complete.
"""
