"""Seeded noise and deterministic sampling."""
