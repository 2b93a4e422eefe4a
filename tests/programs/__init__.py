"""Tests of `jopt.programs`, and the models they share."""
