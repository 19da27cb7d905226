"""Batches for one rank, what they cost, and the samples that could not be used."""
