"""One file a command: what `python -m finetune COMMAND` does with a recipe that has been read."""
