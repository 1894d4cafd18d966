"""The distributed engine: phases A, B and C of a chunk over a mesh of ranks. Usable without `tpctl`."""

__version__ = "0.1.0"
