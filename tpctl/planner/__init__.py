"""Before a launch: will it fit, will it divide, what will bind, how fast."""
