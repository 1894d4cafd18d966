"""A job for a cluster: the batch script or the manifest that starts `tpctl up` on each of its nodes.

Over existing engines: the scheduler places the nodes, torchrun starts the ranks, `tpctl up --foreground` supervises.
"""
