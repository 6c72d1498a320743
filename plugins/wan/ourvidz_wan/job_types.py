"""The four WAN job types, as data."""

from __future__ import annotations

from ourvidz_core.wire.job_types import ContentType, JobType, Quality
from ourvidz_wan.config import WanConfig
from ourvidz_wan.keys import WanConfigKeys, WanMetadataKeys, WanVideoConfigKeys

WAN_QUEUE = "wan_queue"

FAST_IMAGE = WanConfig(sample_steps=25, sample_guide_scale=6.5, frame_num=1)
HIGH_IMAGE = WanConfig(sample_steps=50, sample_guide_scale=7.5, frame_num=1)
FAST_VIDEO = WanConfig(sample_steps=25, sample_guide_scale=6.5, frame_num=81)
HIGH_VIDEO = WanConfig(sample_steps=50, sample_guide_scale=7.5, frame_num=81)

#: Weights in bfloat16 (transformer 2.8, text encoder 11.4, VAE 0.5) and the work of one frame or of 81.
IMAGE_VRAM_GB = 17.0
VIDEO_VRAM_GB = 22.0

JOB_TYPES = (
    JobType(
        name="image_fast",
        queue=WAN_QUEUE,
        content_type=ContentType.IMAGE,
        quality=Quality.FAST,
        preset=FAST_IMAGE,
        config_keys=WanConfigKeys,
        metadata_keys=WanMetadataKeys,
        max_asset_mb=5,
        vram_gb=IMAGE_VRAM_GB,
        expected_seconds=25,
        timeout_seconds=300,
        description="one WAN image, 25 steps",
    ),
    JobType(
        name="image_high",
        queue=WAN_QUEUE,
        content_type=ContentType.IMAGE,
        quality=Quality.HIGH,
        preset=HIGH_IMAGE,
        config_keys=WanConfigKeys,
        metadata_keys=WanMetadataKeys,
        max_asset_mb=10,
        vram_gb=IMAGE_VRAM_GB,
        expected_seconds=40,
        timeout_seconds=300,
        description="one WAN image, 50 steps",
    ),
    JobType(
        name="video_fast",
        queue=WAN_QUEUE,
        content_type=ContentType.VIDEO,
        quality=Quality.FAST,
        preset=FAST_VIDEO,
        config_keys=WanVideoConfigKeys,
        metadata_keys=WanMetadataKeys,
        max_asset_mb=50,
        vram_gb=VIDEO_VRAM_GB,
        expected_seconds=135,
        timeout_seconds=900,
        description="a five-second WAN video, 25 steps",
    ),
    JobType(
        name="video_high",
        queue=WAN_QUEUE,
        content_type=ContentType.VIDEO,
        quality=Quality.HIGH,
        preset=HIGH_VIDEO,
        config_keys=WanVideoConfigKeys,
        metadata_keys=WanMetadataKeys,
        max_asset_mb=200,
        vram_gb=VIDEO_VRAM_GB,
        expected_seconds=180,
        timeout_seconds=1200,
        description="a five-second WAN video, 50 steps",
    ),
)
