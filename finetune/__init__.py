"""Adapt any Hugging Face image-classification folder to a user's own classes."""
