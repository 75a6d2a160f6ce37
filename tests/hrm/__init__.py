"""Tests of the closed-form model."""
