"""Metrics of features as pure functions of tensors: k-NN and linear probes, feature rank."""
