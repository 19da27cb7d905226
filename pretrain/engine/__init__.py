"""Everything that depends on DeepSpeed: building the engine, its partitions, parameter placement and weight averages."""
