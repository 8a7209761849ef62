"""Kernels: writing the paged cache by slot, attention through block tables, and the small operations around them.

May import torch, Triton (triton_*.py and flash.py alone) and of minillm what a layer is made of: `config`, `model`,
`attention`, `masks`, `sampling_params` and `errors`. `dispatch` picks among them.
"""
