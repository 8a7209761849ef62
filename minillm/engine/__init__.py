"""Layers 1 and 2 of the engine: requests, the scheduler that decides who computes what, and what drives them.

`request`, `queue`, `block_manager` and the schedulers import neither torch nor numpy; nothing here imports `serving`.
`runtime` executes the plans.
"""
