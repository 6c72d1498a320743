"""A file of weights that is a program is not run."""

from __future__ import annotations

from pathlib import Path

import pytest

from ourvidz_core.errors import ModelUnavailable

pytest.importorskip("ourvidz_wan")


class Program:
    """Pickled, it is a call that whoever reads it back makes."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[object, tuple[str, str]]:
        return open, (str(self.marker), "w")


@pytest.mark.parametrize("pattern", ["models_t5*.pth", "*VAE*.pth"])
def test_a_checkpoint_that_is_a_program_is_refused_unrun(pattern: str, tmp_path: Path) -> None:
    import torch
    from ourvidz_wan.checkpoints import load_models
    from ourvidz_wan.tasks import TASKS

    from examples.models import tiny_wan

    native = tmp_path / "native"
    tiny_wan.save_native(tiny_wan.make_pipeline(), native)
    (file,) = native.glob(pattern)
    torch.save(Program(tmp_path / "was-run"), file)

    with pytest.raises(ModelUnavailable, match="something else than weights"):
        load_models(native, TASKS["t2v-1.3B"]).pipeline.text_encoder  # noqa: B018 - loaded when it is asked for

    assert not (tmp_path / "was-run").exists()
