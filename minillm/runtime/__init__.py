"""Layer 3: what touches tensors. Executors turn a scheduler's plan into forward passes of the model.

May import the rooms of the model (`model`, `attention`, `kv_cache`, `sampling`, `memory`) and the plain data of
`plan` and `memory_ledger`; never `engine` or `serving`.
"""
