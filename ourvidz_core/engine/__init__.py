"""The child process that owns the device, its parent's side, and what plugins use inside it."""
