"""Plugins for other programs; each is imported by its program only."""
