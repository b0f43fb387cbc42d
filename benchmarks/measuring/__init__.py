"""How a step is measured, and the files that keep the result."""
