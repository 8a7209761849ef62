"""Kernels that read and write the paged cache: writing by slot, and attention through block tables.

May import torch and nothing else of minillm but `config`, `attention` and `errors`.
"""
