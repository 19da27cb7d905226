"""Heartbeats of all ranks, and the watch that finds ranks that hang, lag or are silent."""
