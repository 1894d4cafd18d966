"""Checklists, runbooks and the crosswalk: what an operator reads, as commands that run."""
