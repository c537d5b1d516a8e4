"""Recipes: one short file per network over one shared training module."""
