"""The worker: claims jobs, walks each through its steps, and reports what happened."""
