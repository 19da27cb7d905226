"""Everything that depends on DeepSpeed: the engine, its partitions, parameter placement and weight averages."""
