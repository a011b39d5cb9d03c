"""Which sample a run reads at which position, without Ray."""
