"""Training: the state, the optimizer, one jitted step, and the loop around it."""
