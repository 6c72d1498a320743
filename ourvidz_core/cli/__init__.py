"""The command line ``ourvidz``."""
