"""The doctor: looks at everything that a worker depends on, and says what is wrong and what to do."""
