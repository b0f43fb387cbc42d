"""What every Triton kernel needs around it: launches as data, pinned launch parameters, explicit fallbacks, argument checks."""
