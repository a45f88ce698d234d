"""Measurements: the machine's ceilings, the peers, our own kernels; every number a JSON line."""
