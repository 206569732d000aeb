"""The command line `hfprune`."""
