"""What scoring and generation cost: time, memory, operations, and the published loops to compare with."""
