"""DeepSpeed and ZeRO: the engine, its settings and state, its first forward passes."""
