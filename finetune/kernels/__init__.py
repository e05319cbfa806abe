"""Fast forms of the definitions in `finetune/model`, with the same signatures; chosen once at start and reported."""
