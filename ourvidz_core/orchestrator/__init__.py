"""The orchestrator: starts workers, watches them, and says how they are."""
