"""The language model we ship: a corpus generator, its training, its evaluation and the trained weights.

`vocabulary` and `corpus` import the standard library only, the rest torch, tokenizers and transformers, of minillm only
its errors. Importing this package loads no model: `CHECKPOINT_DIR` is where the weights lie.
"""

from pathlib import Path

CHECKPOINT_DIR = Path(__file__).parent / "checkpoint"  # a normal transformers checkpoint, package data

__all__ = ["CHECKPOINT_DIR"]
