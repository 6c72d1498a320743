"""Which hooks a plugin was made for. The major version of core is the version of its hooks.

A plugin says what it needs where it says it to pip, in the requirements of its
distribution: ``ourvidz-core>=1,<2``. Images are often built with ``pip install --no-deps``,
so the requirement is checked again before the plugin is imported.
"""

from __future__ import annotations

from collections.abc import Iterable

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

CORE = "ourvidz-core"


class HookDeprecated(DeprecationWarning):
    """A hook, or an argument of one, will be gone.

    Given to ``@hookspec(warn_on_impl=...)`` or, by name of the argument, to
    ``@hookspec(warn_on_impl_args={...})``; whoever still implements it is told when it is loaded.

    >>> str(HookDeprecated("the argument payload", since="1.2", removed_in="1.4", cure="use job"))
    'the argument payload is deprecated since ourvidz-core 1.2 and will be gone in 1.4; use job'
    """

    def __init__(self, what: str, *, since: str, removed_in: str, cure: str) -> None:
        super().__init__(f"{what} is deprecated since {CORE} {since} and will be gone in {removed_in}; {cure}")


def incompatibility_of(distribution: str, requires: Iterable[str], core_version: str) -> str | None:
    """Why a distribution with these requirements cannot work with this core; None where it can.

    :raises packaging.requirements.InvalidRequirement: one of them cannot be read.
    """
    for requirement in map(Requirement, requires):
        if canonicalize_name(requirement.name) != CORE:
            continue
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        if not requirement.specifier.contains(core_version, prereleases=True):
            return (
                f"it needs {CORE} {requirement.specifier} and this is {core_version};"
                f" pip install --upgrade {distribution} {CORE} chooses releases that fit each other"
            )
    return None
