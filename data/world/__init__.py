"""The calibration world: made-up facts and questions of which we know how many tool calls each needs."""
