"""DeepSpeed: the engine, float32 masters by ZeRO stage, optimizers and schedules."""
