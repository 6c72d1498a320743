"""Hooks, and how installed plugins are found, checked and asked."""
