"""Scores: how much the model relies on each unit. One method a file."""
