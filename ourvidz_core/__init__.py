"""Turn a message on a queue into stored media and one truthful callback.

This is the one import root for plugin authors; its submodules are for those who embed
or extend the framework itself.
"""

from __future__ import annotations

__version__ = "0.1.0"
