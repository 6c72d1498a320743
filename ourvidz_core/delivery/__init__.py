"""What leaves and enters a worker: the queue, reference images, storage and callbacks.

Each has a narrow protocol, the real client and a double that tests and a laptop can use.
"""
