"""Values that travel between a producer, a worker, an engine and a receiver, and their codecs."""
