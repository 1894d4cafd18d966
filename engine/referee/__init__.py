"""The referee: a process outside the ranks, one a host, that sees how a job breaks and ends it.

    python -m engine.referee --run-dir RUN --ranks 0,1

It reads what the ranks leave in their black boxes, holds a pidfd of each, and reads the kernel's word on whether one
runs, is stopped or is dead. `watch` gathers that into a frozen snapshot; `judge` is a pure function from a snapshot to
a verdict. What can be proved needs no timeout. Ranks never wait for the referee: if it dies, the job goes on.
"""
