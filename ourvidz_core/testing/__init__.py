"""Helpers for the tests of plugin authors and our own: doubles, real servers, real distributions."""
