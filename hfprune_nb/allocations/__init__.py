"""Allocations: how many neurons each layer keeps."""
