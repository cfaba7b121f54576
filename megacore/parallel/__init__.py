"""Process groups, the collectives with their gradients, and what must be computed across tensor-parallel ranks."""
