"""The SDXL job types, as data."""

from __future__ import annotations

from ourvidz_core.wire.job_types import ContentType, JobType, Quality
from ourvidz_sdxl.config import SdxlConfig
from ourvidz_sdxl.keys import SdxlConfigKeys, SdxlMetadataKeys

#: Weights in half precision and the work of one image of 1024x1024, in GiB.
VRAM_GB = 10.0

JOB_TYPES = (
    JobType(
        name="sdxl_image_fast",
        queue="sdxl_queue",
        content_type=ContentType.IMAGE,
        quality=Quality.FAST,
        preset=SdxlConfig(num_inference_steps=15, guidance_scale=6.0),
        config_keys=SdxlConfigKeys,
        metadata_keys=SdxlMetadataKeys,
        max_asset_mb=5.0,
        vram_gb=VRAM_GB,
        expected_seconds=30.0,
        description="1, 3 or 6 images by SDXL in 15 steps",
        sample={
            "prompt": "a lighthouse on a rocky coast at (sunset:1.2), detailed, photorealistic",
            "config": {"num_images": 3, "sample_solver": "unipc", "seed": 42},
        },
    ),
    JobType(
        name="sdxl_image_high",
        queue="sdxl_queue",
        content_type=ContentType.IMAGE,
        quality=Quality.HIGH,
        preset=SdxlConfig(num_inference_steps=25, guidance_scale=7.5),
        config_keys=SdxlConfigKeys,
        metadata_keys=SdxlMetadataKeys,
        max_asset_mb=10.0,
        vram_gb=VRAM_GB,
        expected_seconds=42.0,
        description="1, 3 or 6 images by SDXL in 25 steps",
        sample={
            "prompt": "a man and a woman dancing in the rain, neon light",
            "config": {"size": "1152*896", "sample_solver": "dpm++", "seed": 42},
        },
    ),
)
