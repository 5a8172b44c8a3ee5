"""What every script stands on: the record of a trajectory, prompts and spans, the model, flags and run folders."""
