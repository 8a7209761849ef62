"""One check function per exercise: `checks.name(your_function)` prints `✓ name: N cases` or says what is wrong.

This room has the cases, the comparison and the messages. May import all of minillm; only the notebooks import it.
"""

from minillm.checks.base import CheckFailed, NotWrittenYet, is_written
from minillm.checks.chapter_01 import (
    few_passes,
    greedy_generate,
    request_metrics,
    temperature_probabilities,
    top_p_probabilities,
)
from minillm.checks.chapter_02 import all_heads, attention, causal_mask, find_mask, layer_flops, window_mask
from minillm.checks.chapter_03 import cache_append, cache_bytes, cached_attend, generate_with_cache, score_endings
from minillm.checks.chapter_04 import chunk_mask, read_in_chunks, windowed_attend
from minillm.checks.chapter_05 import left_pad, padded_pass, padding, padding_mask, static_batches
from minillm.checks.chapter_06 import attend_caches, block_diagonal_mask, few_rectangles, restarting_positions
from minillm.checks.chapter_07 import queue_order, schedule_step, serve_continuously
from minillm.checks.chapter_08 import allocate, begin_table, choose_victim, make_room, schedule_paged
from minillm.checks.chapter_09 import decode_step_seconds, key_number, merge_softmax, paged_decode, slot_of
from minillm.checks.chapter_09_kernel import my_decode
from minillm.checks.chapter_10 import admission, sse_events, take
from minillm.checks.chapter_10_loop import run_engine, stream_request
from minillm.checks.chapter_11 import better_within, engine_arguments, explain, setting_with
from minillm.checks.chapter_12 import choose_replica, fast_plan, mlp_on_rank, part_of, ring_seconds
from minillm.checks.predictions import prediction
from minillm.checks.puzzles import beside, key_reads
from minillm.checks.unsolved import judged, needs

__all__ = [
    "CheckFailed",
    "NotWrittenYet",
    "admission",
    "all_heads",
    "allocate",
    "attend_caches",
    "attention",
    "begin_table",
    "beside",
    "better_within",
    "block_diagonal_mask",
    "cache_append",
    "cache_bytes",
    "cached_attend",
    "causal_mask",
    "choose_replica",
    "choose_victim",
    "chunk_mask",
    "decode_step_seconds",
    "engine_arguments",
    "explain",
    "fast_plan",
    "few_passes",
    "few_rectangles",
    "find_mask",
    "generate_with_cache",
    "greedy_generate",
    "is_written",
    "key_number",
    "key_reads",
    "layer_flops",
    "left_pad",
    "make_room",
    "merge_softmax",
    "mlp_on_rank",
    "my_decode",
    "needs",
    "padded_pass",
    "padding",
    "padding_mask",
    "paged_decode",
    "part_of",
    "prediction",
    "queue_order",
    "read_in_chunks",
    "request_metrics",
    "restarting_positions",
    "ring_seconds",
    "run_engine",
    "schedule_paged",
    "schedule_step",
    "score_endings",
    "serve_continuously",
    "setting_with",
    "slot_of",
    "sse_events",
    "static_batches",
    "stream_request",
    "take",
    "temperature_probabilities",
    "top_p_probabilities",
    "window_mask",
    "windowed_attend",
]

for _name in __all__:
    if globals()[_name].__module__.startswith("minillm.checks.chapter_"):
        globals()[_name] = judged(globals()[_name])
