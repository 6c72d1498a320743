"""Watches a worker from its events: the board, metrics, traces, health. Nothing here is on a job's way."""
