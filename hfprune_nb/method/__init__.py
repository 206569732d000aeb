"""Criteria, scoring, allocation and pruning of MLP neurons."""
