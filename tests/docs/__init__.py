"""The pages: what of them is generated, that it is fresh, and that every command in them runs."""
