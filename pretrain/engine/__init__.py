"""All that knows DeepSpeed: building the engine, its partitions, parameter placement and weight averages."""
