"""Kernels that read and write the paged cache: writing by slot, and attention through block tables.

May import torch, Triton (triton_kernels.py alone) and nothing else of minillm but `config`, `attention` and `errors`.
"""
