"""Scores of a standalone model."""
