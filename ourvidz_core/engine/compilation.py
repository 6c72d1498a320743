"""Whether kernels are compiled for the device, where they are kept, and the way back where it fails.

Compiling takes a minute or two on a new machine and seconds after that, as long as the
kernels are kept: ``keep_kernels`` says where, before torch is imported.
"""

from __future__ import annotations

import logging
import os
import shutil
import sys
import sysconfig
import time
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from contextlib import contextmanager
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from attrs import frozen

from ourvidz_core.settings import CompileMode, Settings, load

logger = logging.getLogger(__name__)

#: Variants of one function: a model's blocks share their code, and each has sizes of its own.
_VARIANTS = 256
_CACHES = {"TORCHINDUCTOR_CACHE_DIR": "inductor", "TRITON_CACHE_DIR": "triton"}
#: What torch calls the making of one function, from the first look at its code to its kernels.
_COMPILING = "_compile.compile_inner"
#: Triton's kernels need tensor cores of this generation.
_LEAST_CAPABILITY = (7, 0)


def may_compile(device: str, environ: Mapping[str, str] = os.environ) -> bool:
    """Whether ``torch.compile`` is wanted and has what it needs on ``device``; says why where it has not.

    Where it may, the compiler is also told to keep as many variants as a model of many sizes needs.
    """
    if not device.startswith("cuda") or load(environ).compile is CompileMode.OFF:
        return False
    if missing := _missing(device, environ):
        _say_once(device, missing)
        return False
    import torch._dynamo

    config: Any = torch._dynamo.config
    config.recompile_limit = max(config.recompile_limit, _VARIANTS)
    config.accumulated_recompile_limit = max(config.accumulated_recompile_limit, 4 * _VARIANTS)
    return True


@frozen(kw_only=True)
class Compiled:
    """What was compiled in this process: kernels that were kept are read in its place, after the same tracing."""

    functions: int
    seconds: float


def compiled_so_far() -> Compiled:
    """How much this process has compiled since it began, sizes of one function apart."""
    utils: Any = sys.modules.get("torch._dynamo.utils")
    times = utils.compilation_time_metrics.get(_COMPILING, []) if utils is not None else []
    return Compiled(functions=len(times), seconds=sum(times))


@contextmanager
def timed_with_compiling(logger: logging.Logger, done: str) -> Iterator[None]:
    """Log that it was ``done``, how long what happens inside took, and what of that was compiling."""
    began, before = time.monotonic(), compiled_so_far()
    yield
    compiled = compiled_so_far()
    logger.info(
        "%s in %.2f s; %d functions were compiled, or found compiled, in %.2f s",
        done,
        time.monotonic() - began,
        compiled.functions - before.functions,
        compiled.seconds - before.seconds,
    )


def keep_kernels(settings: Settings, environ: MutableMapping[str, str] = os.environ) -> None:
    """Have compiled kernels kept from one engine to the next. Before torch is imported; what is set stays."""
    directory = settings.kernels_dir or settings.state_dir / "kernels"
    if not _is_writable(directory):
        logger.warning("compiled kernels cannot be kept in %s; set OURVIDZ_KERNELS_DIR", directory)
        return
    for variable, name in _CACHES.items():
        environ.setdefault(variable, str(directory / name))


class CompiledCall:
    """A compiled function that turns into ``plain``, for good and with one warning, where compiling fails.

    ``options`` are ``torch.compile``'s; sizes are taken as they are, so each new one is compiled. Give
    ``compiled`` where the function is compiled in another way, such as in parts.
    """

    def __init__(
        self, plain: Callable[..., Any], *, name: str, compiled: Callable[..., Any] | None = None, **options: Any
    ) -> None:
        self._plain = plain
        self._name = name
        self._compiled = compiled
        if compiled is None:
            import torch

            self._compiled = torch.compile(plain, **{"dynamic": False, **options})

    @property
    def is_compiled(self) -> bool:
        """Whether the compiled function is still in use."""
        return self._compiled is not None

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        """Call it.

        :raises torch.OutOfMemoryError: as the plain function does.
        """
        if self._compiled is not None:
            try:
                return self._compiled(*arguments, **options)
            except Exception as error:
                if not is_compiler_error(error):
                    raise
                logger.warning("%s cannot be compiled and runs slower: %s", self._name, _first_line(error))
                self._compiled = None
        return self._plain(*arguments, **options)


def is_compiler_error(error: BaseException) -> bool:
    """Whether torch's compiler, Triton or the C compiler failed, and not the device or the model."""
    if "out of memory" in str(error).lower():
        return False
    kinds = [cls for link in _chain(error) for cls in type(link).__mro__]
    return any(cls.__module__.startswith(("torch._dynamo", "torch._inductor", "triton")) for cls in kinds)


def _missing(device: str, environ: Mapping[str, str]) -> str | None:
    import torch

    if find_spec("triton") is None:
        return "Triton is not installed"
    if torch.cuda.get_device_capability(device) < _LEAST_CAPABILITY:
        return "the device is too old for Triton"
    if not environ.get("CC") and not shutil.which("gcc") and not shutil.which("clang"):
        return "there is no C compiler; install gcc"
    # Where Triton looks: Debian's own scheme would name a directory that its packages leave empty.
    scheme = sysconfig.get_default_scheme().replace("posix_local", "posix_prefix")
    if not Path(sysconfig.get_path("include", scheme), "Python.h").is_file():
        return "Python.h is missing; install Python's development files"
    return None


@cache
def _say_once(device: str, missing: str) -> None:
    logger.warning("nothing is compiled for %s, and models run slower: %s", device, missing)


def _is_writable(directory: Path) -> bool:
    existing = next(path for path in (directory, *directory.absolute().parents) if path.exists())
    return existing.is_dir() and os.access(existing, os.W_OK | os.X_OK)


def _chain(error: BaseException) -> list[BaseException]:
    links: list[BaseException] = []
    link: BaseException | None = error
    while link is not None and link not in links:
        links.append(link)
        link = link.__cause__
    return links


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
