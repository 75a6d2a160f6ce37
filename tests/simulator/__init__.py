"""Tests of the schedules and of the engine that plays them."""
