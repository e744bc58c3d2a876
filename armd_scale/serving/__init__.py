"""A small HTTP server for a standalone model."""
