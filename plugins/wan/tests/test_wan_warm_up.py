"""What a worker with --preload does for WAN: the first job finds weights and negative prompt ready."""

from __future__ import annotations

import logging
import re

from ourvidz_wan import plugin
from ourvidz_wan.config import WanSettings
from ourvidz_wan.execution import shapes_to_warm
from ourvidz_wan.job_types import JOB_TYPES

from ourvidz_core.engine.models import ModelCache
from ourvidz_core.engine.tiers import Tier
from ourvidz_core.testing.doubles import RecordingContext


def test_warming_up_loads_the_weights_and_encodes_the_negative_prompt(tmp_path, model_dir, caplog):
    models = ModelCache()
    context = RecordingContext(tmp_path, environ={"OURVIDZ_WAN_CKPT_DIR": str(model_dir)}, models=models)

    with caplog.at_level(logging.INFO, logger="ourvidz_wan"):
        plugin.warm_up(context=context, job_types=JOB_TYPES)

    *beginning, made = caplog.messages
    assert beginning == [
        "importing torch",
        "importing diffusers and transformers",
        "loading the model",
        "making a step of 1 frames at 480*832, exact tier",
    ]
    assert re.fullmatch(r"made it in \d+\.\d\d s; 0 functions were compiled, .*", made)
    (key,) = models.keys
    assert key == f"wan:t2v-1.3B:{model_dir}"
    warm = models.get(key, lambda: None)
    assert warm.variant.negative_prompt in warm.texts
    assert context.steps == [("generate", 1, 1)]


def test_models_that_wait_in_main_memory_are_warmed_as_well(tmp_path, model_dir):
    environ = {"OURVIDZ_WAN_CKPT_DIR": str(model_dir), "OURVIDZ_WAN_OFFLOAD_MODEL": "true"}
    context = RecordingContext(tmp_path, environ=environ, models=ModelCache())

    plugin.warm_up(context=context, job_types=JOB_TYPES)

    assert context.steps == [("generate", 1, 1)]


def test_nothing_is_loaded_for_a_script_that_loads_its_own(tmp_path, model_dir):
    models = ModelCache()
    environ = {"OURVIDZ_WAN_CKPT_DIR": str(model_dir), "OURVIDZ_WAN_RUN_AS": "subprocess"}

    plugin.warm_up(context=RecordingContext(tmp_path, environ=environ, models=models), job_types=JOB_TYPES)

    assert models.keys == ()


def test_a_gpu_is_warmed_for_every_shape_that_presets_have():
    assert shapes_to_warm(JOB_TYPES, "cpu", WanSettings(fp8_attention=True)) == [("480*832", 1, Tier.EXACT)]
    exact = [("480*832", 1, Tier.EXACT), ("480*832", 81, Tier.EXACT)]
    assert shapes_to_warm(JOB_TYPES, "cuda:0", WanSettings()) == exact
    in_fp8 = [("480*832", 81, Tier.FAST)]
    assert shapes_to_warm(JOB_TYPES, "cuda:0", WanSettings(fp8_attention=True)) == [*exact, *in_fp8]
