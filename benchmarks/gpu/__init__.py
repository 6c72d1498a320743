"""What a GPU does with OurVidz and with plain diffusers and transformers: ``python -m benchmarks.gpu``."""
