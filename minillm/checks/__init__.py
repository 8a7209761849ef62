"""One check function for each exercise: `checks.name(your_function)` prints `✓ name: N cases` or says what is wrong.

Lives here: the cases, the comparison and the messages. May import all of minillm; nothing but the notebooks imports it.
"""

from minillm.checks.base import CheckFailed, NotWrittenYet
from minillm.checks.chapter_01 import (
    greedy_generate,
    request_metrics,
    temperature_probabilities,
    top_p_probabilities,
    total_milliseconds,
)
from minillm.checks.chapter_02 import attention, attention_share, causal_mask, visible_tokens, window_mask
from minillm.checks.chapter_03 import cache_append, cache_mebibytes, kv_bytes, naive_over_cached, requests_that_fit
from minillm.checks.predictions import prediction
from minillm.checks.puzzles import beside

__all__ = [
    "CheckFailed",
    "NotWrittenYet",
    "attention",
    "attention_share",
    "beside",
    "cache_append",
    "cache_mebibytes",
    "causal_mask",
    "greedy_generate",
    "kv_bytes",
    "naive_over_cached",
    "prediction",
    "request_metrics",
    "requests_that_fit",
    "temperature_probabilities",
    "top_p_probabilities",
    "total_milliseconds",
    "visible_tokens",
    "window_mask",
]
