"""``python -m ourvidz_core``: the command line."""

from ourvidz_core.cli.main import entry_point

entry_point()
