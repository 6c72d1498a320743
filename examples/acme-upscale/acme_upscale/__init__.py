"""The job type acme_upscale for OurVidz, made in the engine process. Its hooks are in :mod:`acme_upscale.plugin`."""
