"""What it costs: memory plans, kernel, step and rollout benchmarks. Nothing imports it."""
