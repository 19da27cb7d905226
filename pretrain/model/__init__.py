"""The Vision Transformer, its decoders and heads in plain torch, and its names in Hugging Face."""
