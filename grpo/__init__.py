"""What you change in an ablation of RL: rewards, advantages, the entropy constraint, the update, its metrics."""
