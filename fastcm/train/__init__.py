"""From a configuration to a trained model: phases, steps, optimizer, checkpoints, report."""
