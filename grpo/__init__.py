"""Rewards, advantages, the entropy constraint, checks and metrics of one RL step; the update is in train_rl.py."""
