"""Where every rank is, and who hangs, lags or is silent."""
