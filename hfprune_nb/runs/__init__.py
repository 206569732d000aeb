"""Addressed artifacts, stages and studies; knows notebooks, not what they do inside."""
