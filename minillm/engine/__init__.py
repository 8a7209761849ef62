"""Layers 1 and 2 of the engine: requests, the scheduler that decides who computes what, and what drives them.

`request`, `queue`, `scheduler`, `block_manager`, `paged_scheduler` and `async_scheduler` import neither torch nor numpy; nothing here
imports `serving`. `runtime` executes the plans.
"""
