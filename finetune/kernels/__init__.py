"""Fast forms of definitions in `finetune/model`, same signatures; chosen once at start and reported."""
