"""Record a run: metrics in a local file first, MLflow from that file, and the progress line in the terminal."""
