"""Pure functions of tensors that measure what a model has learned."""
