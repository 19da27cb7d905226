"""Restart a run after crashes and hangs, and account for the time it spent."""
