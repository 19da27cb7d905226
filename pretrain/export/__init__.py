"""A checkpoint becomes an ordinary Hugging Face folder that proves itself."""
