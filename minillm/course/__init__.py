"""The chapters as files: executing them in canonical form, and copies for readers.

May import `viz`, `checks` and the rooms below; only `cli` imports it.
"""
