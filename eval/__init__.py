"""Grades answers, counts wasted and missing calls, and evaluates trajectory files. Never loads a model."""
