"""The logs of a run, each read as it grows, and merged into one order of cause and effect."""
