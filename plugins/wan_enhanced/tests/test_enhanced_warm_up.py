"""What a worker with --preload does for enhanced jobs: the first prompt finds its writer loaded."""

from __future__ import annotations

import pytest
from ourvidz_wan_enhanced import plugin
from ourvidz_wan_enhanced.enhancement import enhance

from ourvidz_core.engine.models import ModelCache
from ourvidz_core.errors import ModelUnavailable
from ourvidz_core.testing.doubles import RecordingContext
from ourvidz_core.wire.job_types import ContentType


def test_the_first_prompt_finds_the_language_model_loaded(tmp_path, qwen_dir):
    models = ModelCache()
    context = RecordingContext(tmp_path, environ={"OURVIDZ_ENHANCER_MODEL": str(qwen_dir)}, models=models)

    plugin.warm_up(context=context)

    assert models.keys == (f"enhancer:{qwen_dir}",)
    enhancement = enhance("a fox", content_type=ContentType.IMAGE, seed=1, context=context)
    assert "enhancement_load_seconds" not in enhancement.facts


def test_a_model_that_is_not_there_is_named(tmp_path):
    context = RecordingContext(tmp_path, environ={"OURVIDZ_ENHANCER_MODEL": str(tmp_path / "absent")})

    with pytest.raises(ModelUnavailable, match="absent"):
        plugin.warm_up(context=context)
