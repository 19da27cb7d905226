"""Fine-tune any Hugging Face image-classification folder on a user's own classes, and use the result."""
