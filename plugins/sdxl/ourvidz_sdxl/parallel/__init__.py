"""The images of one SDXL job on several GPUs: rank 0 is the engine, each other rank a process that draws its part."""
