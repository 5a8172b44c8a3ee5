"""Who samples: one file per engine with `complete(…)`, and what all of them share (turns, tool box, flags)."""
