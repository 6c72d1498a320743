"""Fill the compiler's caches: ``python -m benchmarks.gpu.fill DEVICE SIDE IMAGES`` draws a step of so many images.

The model and the caches are those that the environment names, as a worker's engine finds them.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from ourvidz_core.engine.compilation import keep_kernels
from ourvidz_core.settings import load


def main() -> None:
    """Before torch is imported, where kernels are kept; then one step."""
    device, side, images = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    keep_kernels(load(os.environ))

    from ourvidz_sdxl.pipeline import ImageRequest, load_pipeline
    from ourvidz_sdxl.references import Samplings
    from ourvidz_sdxl.settings import SdxlSettings
    from ourvidz_sdxl.variants import SdxlVariant

    from ourvidz_core.engine.variants import read_variant

    model = Path(os.environ["OURVIDZ_SDXL_MODEL"])
    pipeline = load_pipeline(model, device=device, variant=read_variant(model, SdxlVariant))
    request = ImageRequest(
        prompt="",
        negative_prompt="",
        seeds=tuple(range(images)),
        width=side,
        height=side,
        num_inference_steps=1,
        guidance_scale=7.5,
    )
    drawn = pipeline.draw(request, sampling=Samplings(SdxlSettings()), on_step=lambda _step, _total, _latents: None)
    for picture in drawn.pictures:
        picture.image()


if __name__ == "__main__":
    main()
