"""Everything DeepSpeed: the engine, ZeRO's float32 masters, optimizers and schedules."""
