"""One WAN job on several GPUs: rank 0 is the engine, each other rank a process that predicts for it."""
