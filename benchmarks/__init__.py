"""Side-by-side measurements, each a ratio against a named rival or limit, taken in one run."""
