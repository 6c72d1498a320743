"""The four enhanced WAN job types, as data. The generator is WAN's own; only the prompt differs."""

from __future__ import annotations

import attrs
from attrs import frozen
from ourvidz_wan.config import WanConfig
from ourvidz_wan.job_types import (
    FAST_IMAGE,
    FAST_VIDEO,
    HIGH_IMAGE,
    HIGH_VIDEO,
    IMAGE_VRAM_GB,
    VIDEO_VRAM_GB,
    WAN_QUEUE,
)
from ourvidz_wan.keys import WanMetadataKeys

from ourvidz_core.wire.job_types import ContentType, JobType, Quality
from ourvidz_wan_enhanced.keys import EnhancedConfigKeys, EnhancedVideoConfigKeys


@frozen(kw_only=True)
class EnhancedConfig(WanConfig):
    """The configuration of one enhanced WAN job."""

    #: Whether the prompt is rewritten; a message may switch it off.
    enhance_prompt: bool = True


def _enhanced(preset: WanConfig) -> EnhancedConfig:
    return EnhancedConfig(**attrs.asdict(preset, recurse=False))


#: ``vram_gb`` is what the generator needs: where language model and generator do not fit
#: together, they take turns on the device.
JOB_TYPES = (
    JobType(
        name="image7b_fast_enhanced",
        queue=WAN_QUEUE,
        content_type=ContentType.IMAGE,
        quality=Quality.FAST,
        preset=_enhanced(FAST_IMAGE),
        config_keys=EnhancedConfigKeys,
        metadata_keys=WanMetadataKeys,
        max_asset_mb=20,
        vram_gb=IMAGE_VRAM_GB,
        expected_seconds=85,
        timeout_seconds=420,
        description="one WAN image of an enhanced prompt, 25 steps",
        sample={"prompt": "a lighthouse on a rocky coast at sunset, detailed, photorealistic", "config": {"seed": 42}},
    ),
    JobType(
        name="image7b_high_enhanced",
        queue=WAN_QUEUE,
        content_type=ContentType.IMAGE,
        quality=Quality.HIGH,
        preset=_enhanced(HIGH_IMAGE),
        config_keys=EnhancedConfigKeys,
        metadata_keys=WanMetadataKeys,
        max_asset_mb=20,
        vram_gb=IMAGE_VRAM_GB,
        expected_seconds=100,
        timeout_seconds=420,
        description="one WAN image of an enhanced prompt, 50 steps",
        sample={"prompt": "a fox in fresh snow, morning light", "config": {"seed": 42}},
    ),
    JobType(
        name="video7b_fast_enhanced",
        queue=WAN_QUEUE,
        content_type=ContentType.VIDEO,
        quality=Quality.FAST,
        preset=_enhanced(FAST_VIDEO),
        config_keys=EnhancedVideoConfigKeys,
        metadata_keys=WanMetadataKeys,
        max_asset_mb=100,
        vram_gb=VIDEO_VRAM_GB,
        expected_seconds=195,
        timeout_seconds=1020,
        description="a five-second WAN video of an enhanced prompt, 25 steps",
        sample={"prompt": "a lighthouse on a rocky coast at sunset", "config": {"seed": 42}},
    ),
    JobType(
        name="video7b_high_enhanced",
        queue=WAN_QUEUE,
        content_type=ContentType.VIDEO,
        quality=Quality.HIGH,
        preset=_enhanced(HIGH_VIDEO),
        config_keys=EnhancedVideoConfigKeys,
        metadata_keys=WanMetadataKeys,
        max_asset_mb=100,
        vram_gb=VIDEO_VRAM_GB,
        expected_seconds=240,
        timeout_seconds=1320,
        description="a five-second WAN video of an enhanced prompt, 50 steps",
        sample={"prompt": "a small boat crosses a calm lake at dawn", "config": {"seed": 42}},
    ),
)
