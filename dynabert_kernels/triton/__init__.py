"""Triton kernels shared by the ops, and the plain functions that launch them.

Importing this package imports no Triton: `availability` says whether the kernels can run, and only
`launch` (imported by the ops when they do) and the kernel files need it.
"""
