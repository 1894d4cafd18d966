"""Helpers shared by tests: real ranks in real processes."""
