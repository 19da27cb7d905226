"""Shared test support: launching commands and ranks, local servers and injected faults."""
