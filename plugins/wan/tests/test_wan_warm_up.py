"""What a worker with --preload does for WAN: the first job finds weights and negative prompt ready."""

from __future__ import annotations

from ourvidz_wan import plugin
from ourvidz_wan.execution import shapes_to_warm
from ourvidz_wan.job_types import JOB_TYPES

from ourvidz_core.engine.models import ModelCache
from ourvidz_core.testing.doubles import RecordingContext


def test_warming_up_loads_the_weights_and_encodes_the_negative_prompt(tmp_path, model_dir):
    models = ModelCache()
    context = RecordingContext(tmp_path, environ={"OURVIDZ_WAN_CKPT_DIR": str(model_dir)}, models=models)

    plugin.warm_up(context=context, job_types=JOB_TYPES)

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
    assert shapes_to_warm(JOB_TYPES, "cpu") == [("480*832", 1)]
    assert shapes_to_warm(JOB_TYPES, "cuda:0") == [("480*832", 1), ("480*832", 81)]
