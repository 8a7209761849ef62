"""Runs without a model (virtual clock, cost model), and the two older ways of batching: static and dynamic schedulers.

May import `engine` and the arithmetic of `costs` and `kv_cache`; the engine never imports this.
"""
