"""When everything happened, on one clock: a run's bars, as trace events and as a picture of the overlap."""
