"""What operations took of a device beside the weights, remembered from run to run.

Peaks are measured, not modelled: which attention kernel runs, what is compiled and how an
allocator packs decide more than any formula. The file is one list of records; a worker that
starts again knows them, and workers of one machine share them.
"""

from __future__ import annotations

import json
import logging
import math
import os
import tempfile
from collections.abc import Callable
from pathlib import Path

import cattrs
from attrs import evolve, frozen

from ourvidz_core.plugins.residency import Work

logger = logging.getLogger(__name__)

FILE_NAME = "memory.json"
#: Allocators round up and leave gaps.
SLACK = 1.1
#: An operation larger than this many times the nearest that was measured is not guessed at.
FARTHEST = 4
#: The oldest leave: a size that nobody asks for any longer need not be known.
KEPT_RECORDS = 1000
#: A change smaller than this share is not worth a write.
_WORTH_WRITING = 0.02
#: The name under which a model's weights are kept; no operation has an empty one.
_WEIGHTS = ""


@frozen(kw_only=True)
class Record:
    """One measured figure."""

    device: str
    model: str
    name: str
    shape: tuple[int, ...]
    rows: int
    peak_bytes: int

    @property
    def work(self) -> Work:
        """The operation that was measured."""
        return Work(name=self.name, shape=self.shape, rows=self.rows)


@frozen(kw_only=True)
class Figures:
    """What an operation would like to have, and what it can be cut down to (bytes)."""

    wanted: int
    #: With one row at a time.
    least: int


class WorkingMemory:
    """Measured peaks by device, model and operation; without a file only while the process lives."""

    def __init__(self, file: Path | None = None, *, device: Callable[[], str] = lambda: "") -> None:
        self._file = file
        self._device = device
        self._records: dict[tuple[str, str, Work], Record] | None = None

    def figures(self, model: str, work: Work) -> Figures | None:
        """The two figures of an operation, None where neither it nor one that is near was measured.

        An operation that was not is taken to grow with its rows and its shape from the nearest one that was.
        """
        wanted, least = self._estimate(model, work), self._estimate(model, evolve(work, rows=1))
        if wanted is None or least is None:
            return None
        return Figures(wanted=wanted, least=min(least, wanted))

    def note(self, model: str, work: Work, peak_bytes: int) -> None:
        """Remember what an operation took. More counts at once; less by half, for one run may be lucky."""
        known = self._known().get(self._key(model, work))
        if known is not None and peak_bytes < known.peak_bytes:
            peak_bytes = (known.peak_bytes + peak_bytes) // 2
        self._keep(model, work, peak_bytes)

    def weights_of(self, model: str) -> int | None:
        """What the model's weights took when it was last loaded (bytes)."""
        record = self._known().get(self._key(model, Work(name=_WEIGHTS)))
        return None if record is None else record.peak_bytes

    def note_weights(self, model: str, size_bytes: int) -> None:
        """Remember what the model's weights take."""
        self._keep(model, Work(name=_WEIGHTS), size_bytes)

    def _estimate(self, model: str, work: Work) -> int | None:
        device = self._device()
        known = self._known()
        if exact := known.get((device, model, work)):
            return round(exact.peak_bytes * SLACK)
        alike = [r for r in known.values() if (r.device, r.model, r.name) == (device, model, work.name)]
        if not alike:
            return None
        nearest = min(alike, key=lambda record: abs(math.log(_extent(record.work) / _extent(work))))
        growth = _extent(work) / _extent(nearest.work)
        return round(nearest.peak_bytes * SLACK * growth) if growth <= FARTHEST else None

    def _keep(self, model: str, work: Work, size_bytes: int) -> None:
        key = self._key(model, work)
        known = self._known().get(key)
        if known is not None and abs(known.peak_bytes - size_bytes) <= _WORTH_WRITING * size_bytes:
            return
        # Another worker may have written since.
        records = self._records = {**(self._records or {}), **self._read()}
        records.pop(key, None)
        records[key] = Record(
            device=key[0], model=model, name=work.name, shape=work.shape, rows=work.rows, peak_bytes=size_bytes
        )
        for oldest in list(records)[:-KEPT_RECORDS]:
            del records[oldest]
        self._write()

    def _known(self) -> dict[tuple[str, str, Work], Record]:
        if self._records is None:
            self._records = self._read()
        return self._records

    def _key(self, model: str, work: Work) -> tuple[str, str, Work]:
        return self._device(), model, work

    def _read(self) -> dict[tuple[str, str, Work], Record]:
        if self._file is None:
            return {}
        try:
            records = cattrs.structure(json.loads(self._file.read_text("utf-8")), list[Record])
            return {(record.device, record.model, record.work): record for record in records if record.rows > 0}
        except FileNotFoundError:
            return {}
        # Whatever is wrong with the file: all in it can be measured again.
        except Exception as error:
            logger.warning("%s is not readable and begins anew: %s", self._file, error)
            return {}

    def _write(self) -> None:
        if self._file is None or self._records is None:
            return
        text = json.dumps([cattrs.unstructure(record) for record in self._records.values()], indent=0)
        try:
            self._file.parent.mkdir(parents=True, exist_ok=True)
            descriptor, unfinished = tempfile.mkstemp(dir=self._file.parent, prefix=f".{self._file.name}-")
            try:
                with os.fdopen(descriptor, "w", encoding="utf-8") as stream:
                    stream.write(text)
                os.replace(unfinished, self._file)
            except OSError:
                os.unlink(unfinished)
                raise
        except OSError as error:
            logger.warning("what operations take of the device is known until this engine ends only: %s", error)
            self._file = None


def _extent(work: Work) -> int:
    return max(1, work.rows) * max(1, math.prod(work.shape))
