"""Instructions that fixed op calls execute, held to committed counts."""
