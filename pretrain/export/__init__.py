"""Export of a checkpoint as an ordinary Hugging Face folder, verified by loading it back."""
