"""Images by Stable Diffusion XL: the job types ``sdxl_image_fast`` and ``sdxl_image_high``."""

__version__ = "0.1.0"
