"""Accuracy against size: bundles of several schemes, measured, in one table and one picture."""
