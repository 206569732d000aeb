"""A model beside its dense reference: tasks, perplexity, fidelity, and their statistics."""
