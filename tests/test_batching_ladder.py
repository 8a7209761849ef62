"""Static, dynamic, ragged and continuous batching give every request the same tokens as alone.

The model is small, random and in float64; logits of every sampled token are compared with one causal pass over the
request alone. Each run proves from its trace that it took the path it is named after, and deliberately broken twins
of each path must be caught by the same comparison.
"""

import dataclasses
import functools
import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import minillm
from minillm.attention import masks
from minillm.engine.request import Request
from minillm.engine.scheduler import SchedulerConfig
from minillm.ladder import attend as callables
from minillm.ladder import contiguous
from minillm.ladder.attend import BlockDiagonalAttention, Part
from minillm.ladder.contiguous import ContiguousExecutor
from minillm.ladder.kv_cache import RowCache
from minillm.ladder.padded_schedulers import MergingScheduler
from minillm.model.decoder import Decoder
from minillm.sampling import SamplingParams, SamplingState, sample
from minillm.simulation.clock import VirtualClock
from minillm.simulation.running import BATCHING, run
from tiny_models import LADDER_TOLERANCE, all_logits

CONFIG = minillm.ModelConfig(
    vocab_size=61,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    max_position_embeddings=96,
    eos_token_ids=(5, 11, 13, 17, 23, 40),
    sliding_windows=(None, 9),
)
LIMITS = SchedulerConfig(max_num_seqs=3, max_num_batched_tokens=8, max_model_len=64)
MIX = [(20, 9, 0), (3, 14, 0), (1, 2, 0), (6, 12, 1), (30, 5, 4), (2, 20, 4), (11, 1, 30), (5, 8, 30)]

WAYS = {**BATCHING, "merging": MergingScheduler}  # only chapter 5 uses the last one


@functools.cache
def model() -> Decoder:
    torch.manual_seed(0)
    decoder = Decoder(CONFIG).double().eval().requires_grad_(False)
    for parameter in decoder.parameters():
        parameter.add_(0.15 * torch.randn_like(parameter))
    return decoder


def request_of(number: int, prompt_length: int, max_tokens: int, arrival: float, sampled: bool = False) -> Request:
    rng = random.Random(f"{number} {prompt_length}")
    prompt = [rng.randrange(CONFIG.vocab_size) for _ in range(prompt_length)]
    params = SamplingParams(temperature=1.0 if sampled else 0.0, max_tokens=max_tokens, seed=number)
    return Request(f"r{number}", prompt, params, eos_token_ids=CONFIG.eos_token_ids, arrival_time=arrival)


class SteppingExecutor(ContiguousExecutor):
    """A step takes one second of virtual time; keeps the logits that each request's tokens were sampled from."""

    def __init__(self, clock: VirtualClock, limits: SchedulerConfig):
        super().__init__(model(), limits.max_num_seqs, limits.max_model_len)
        self.clock = clock
        self.logits: dict[str, list[torch.Tensor]] = {}

    def execute_model(self, plan):
        sampled_from = []

        def note(logits, *how):
            sampled_from.append(logits)
            return sample(logits, *how)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(contiguous, "sample", note)
            output = super().execute_model(plan)
        self.clock.advance(1.0)
        for request_id, row in zip(output.token_ids, *sampled_from or [()], strict=True):
            self.logits.setdefault(request_id, []).append(row)
        return output


def run_batching(batching: str, requests: list[Request], limits: SchedulerConfig = LIMITS):
    """The trace, and the executor with the logits."""
    clock = VirtualClock()
    executor = SteppingExecutor(clock, limits)
    trace = run(WAYS[batching](limits, clock), executor, requests, clock)
    return trace, executor


def largest_difference(requests: list[Request], logits: dict[str, list[torch.Tensor]]) -> float:
    """Of any logit from that of one causal pass over the request alone."""
    return max(
        (torch.stack(logits[request.request_id]) - logits_alone(request)).abs().max().nan_to_num(torch.inf).item()
        for request in requests
    )


def logits_alone(request: Request) -> torch.Tensor:
    """[outputs, ids] logits that each output token is sampled from, all earlier ones given."""
    token_ids = [*request.prompt_token_ids, *request.output_token_ids]
    return all_logits(model(), token_ids)[request.num_prompt_tokens - 1 : -1]


def tokens_alone(request: Request) -> tuple[int, ...]:
    return minillm.generate_cached(model(), request.prompt_token_ids, request.params).token_ids


def check_alone(requests, executor):
    assert largest_difference(requests, executor.logits) <= LADDER_TOLERANCE
    for request in requests:
        assert tuple(request.output_token_ids) == tokens_alone(request)


def check_path(batching, trace):
    """The run did what its batching policy is for: chunks, joining, leaving, padding."""
    parts = [(step.step, part) for step in trace.steps for part in step.scheduled]
    chunks = [part.request_id for _, part in parts if part.why == "prefill"]
    padding = sum(part.num_tokens for _, part in parts if part.why == "padding")
    begun = {part.request_id: number for number, part in reversed(parts)}
    assert len(set(begun.values())) > 1, "somebody joined later"
    if batching == "continuous":
        assert len(chunks) > len(set(chunks)) and padding == 0
        assert any({part.why for part in step.scheduled} == {"prefill", "decode"} for step in trace.steps)
    else:
        assert len(chunks) == len(set(chunks)) and padding > 0
    early = [step.finished for step in trace.steps if step.finished and len(step.scheduled) > len(step.finished)]
    if batching == "static":
        left_at = {request_id: step.step for step in trace.steps for request_id in step.finished}
        last = {part.request_id: number for number, part in parts if part.num_sampled}
        assert any(left_at[request_id] > last[request_id] for request_id in last), "somebody waited for the batch"
    else:
        assert early, "somebody left while others went on"


# --- equality --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batching", WAYS)
@pytest.mark.parametrize("sampled", [False, True], ids=["greedy", "sampled"])
def test_a_mix_of_requests_gets_what_each_would_get_alone(batching, sampled):
    requests = [request_of(number, *shape, sampled) for number, shape in enumerate(MIX)]
    trace, executor = run_batching(batching, requests)
    check_alone(requests, executor)
    check_path(batching, trace)
    assert {request.finish_reason for request in requests} == {"stop", "length"}


SHAPES = st.tuples(st.integers(1, 12), st.integers(1, 10), st.integers(0, 12))


@settings(max_examples=20, deadline=None, derandomize=True)
@given(
    shapes=st.lists(SHAPES, min_size=1, max_size=5),
    long=st.tuples(st.integers(9, 30), st.integers(2, 8), st.integers(0, 6)),
    place=st.integers(0, 5),
    limits=st.builds(SchedulerConfig, st.integers(1, 4), st.integers(4, 8), st.just(64)),
)
def test_any_mix_in_any_order_of_arrival(shapes, long, place, limits):
    """One prompt is longer than the budget, so continuous batching always has to cut it."""
    shapes.insert(place, long)
    for batching in BATCHING:
        requests = [request_of(number, *shape) for number, shape in enumerate(shapes)]
        trace, executor = run_batching(batching, requests, limits)
        check_alone(requests, executor)
        chunks = [part for step in trace.steps for part in step.scheduled if part.why == "prefill"]
        assert (len(chunks) > len(shapes)) == (batching == "continuous")


def test_an_aborted_request_leaves_its_neighbours_untouched_and_its_row_is_used_again():
    requests = [request_of(number, *shape) for number, shape in enumerate(MIX)]
    clock = VirtualClock()
    executor = SteppingExecutor(clock, LIMITS)
    scheduler = BATCHING["continuous"](LIMITS, clock)
    run(
        scheduler,
        executor,
        requests,
        clock,
        on_step=lambda plan, updates: plan.step == 4 and scheduler.abort_request("r1"),
    )
    assert requests[1].finish_reason == "abort" and len(requests[1].output_token_ids) < 14
    check_alone([request for request in requests if request.request_id != "r1"], executor)


# --- ragged, without a cache (chapter 6) -----------------------------------------------------------------------------

RAGGED = [7, 1, 4, 12]


def ragged_difference(attend) -> float:
    """Largest difference of prompts computed together from each alone; positions restart at 0 for each."""
    prompts = [request_of(number, length, 1, 0).prompt_token_ids for number, length in enumerate(RAGGED)]
    positions = torch.cat([torch.arange(length) for length in RAGGED])
    with torch.inference_mode():
        together = model().logits(model()(torch.tensor(sum(prompts, [])), positions, attend))
    alone = torch.cat([all_logits(model(), prompt) for prompt in prompts])
    return (together - alone).abs().max().item()


@pytest.mark.parametrize(("dense", "scores"), [(True, sum(RAGGED) ** 2), (False, sum(n * n for n in RAGGED))])
def test_ragged_prompts_do_not_see_each_other(dense, scores):
    attend = BlockDiagonalAttention(CONFIG, RAGGED, dense)
    assert ragged_difference(attend) <= LADDER_TOLERANCE
    assert attend.score_entries == scores


def test_a_visible_neighbour_is_noticed(monkeypatch):
    monkeypatch.setattr(masks, "block_diagonal", lambda lengths, **options: masks.causal(sum(lengths), **options))
    assert ragged_difference(BlockDiagonalAttention(CONFIG, RAGGED, dense=True)) > 1e-3


# --- broken twins ----------------------------------------------------------------------------------------------------


def unmasked_pads(monkeypatch):
    """Queries see all keys of the rectangle, also behind their own last one."""
    right = callables.RowAttention.mask

    def mask(self, positions, num_keys, window):
        return right(self, torch.full_like(positions, num_keys - 1), num_keys, None)

    monkeypatch.setattr(callables.RowAttention, "mask", mask)


def position_off_by_one(monkeypatch):
    """RoPE turns the newest token of the step by one position too many."""
    right = ContiguousExecutor._forward

    def forward(self, token_ids, positions, attend):
        return right(self, token_ids, [p + (p == max(positions)) for p in positions], attend)

    monkeypatch.setattr(ContiguousExecutor, "_forward", forward)


def wrong_row(monkeypatch):
    """Reads the cache of the next request."""
    right = RowCache.read

    def read(self, layer, rows, num_tokens):
        return right(self, layer, [*rows[1:], rows[0]], num_tokens)

    monkeypatch.setattr(RowCache, "read", read)


def neighbour_visible(monkeypatch):
    """The first key of a request is its neighbour's."""
    right = RowCache.read

    def read(self, layer, rows, num_tokens):
        keys, values = (x.clone() for x in right(self, layer, rows, num_tokens))
        keys[:, :, 0], values[:, :, 0] = keys[:, :, 0].roll(1, 0), values[:, :, 0].roll(1, 0)
        return keys, values

    monkeypatch.setattr(RowCache, "read", read)


def stored_one_place_late(monkeypatch):
    """Keys and values land one position behind where they are looked for."""
    right = RowCache.places
    monkeypatch.setattr(RowCache, "places", lambda self, rows, positions: right(self, rows, positions + 1))


TWINS = [unmasked_pads, position_off_by_one, wrong_row, neighbour_visible, stored_one_place_late]


@pytest.mark.parametrize("batching", BATCHING)
@pytest.mark.parametrize("twin", TWINS, ids=lambda twin: twin.__name__)
def test_a_broken_twin_is_noticed(batching, twin, monkeypatch):
    twin(monkeypatch)
    requests = [request_of(number, *shape) for number, shape in enumerate(MIX)]
    _, executor = run_batching(batching, requests)
    assert largest_difference(requests, executor.logits) > 1e-3


# --- parts -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("window", [None, 3])
def test_the_mask_of_a_rectangle_is_that_of_masks_padded(window):
    parts = [Part(0, 4, 2), Part(1, 0, 3), Part(2, 0, 0), Part(3, 6, 1)]
    cache = RowCache(CONFIG, 4, 16, torch.float64)
    attend = callables.PaddedAttention(CONFIG, cache, parts, 3)
    rows = [masks.padded(part.num_tokens, part.end, 3, 7, window=window) for part in parts]
    added = attend.row_mask(window)  # [B, 1, group * L, K]
    assert torch.equal(added[:, 0].unflatten(1, (2, 3)) == 0, torch.stack(rows)[:, None].expand(-1, 2, -1, -1))


def test_pads_come_out_as_zeros_never_nan():
    parts = [Part(0, 0, 1), Part(1, 0, 3), Part(2, 0, 0)]
    cache = RowCache(CONFIG, 3, 8, torch.float64)
    attend = callables.PaddedAttention(CONFIG, cache, parts, 3)
    torch.manual_seed(0)
    out = attend(0, torch.randn(9, 4, 16).double(), *torch.randn(2, 9, 2, 16).double())
    is_zero = (out == 0).all(-1).all(-1).tolist()
    assert is_zero == [True, True, False, False, False, False, True, True, True]


@pytest.mark.parametrize("batching", BATCHING)
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_request_that_is_not_finite_fails_alone(batching, temperature):
    """The others get the same as alone, including the next one in its row of the cache."""
    requests = [request_of(number, *shape, 0) for number, (*shape, _) in enumerate(MIX[:5])]
    requests[1].params = dataclasses.replace(requests[1].params, temperature=temperature)
    others = [request for request in requests if request is not requests[1]]
    expected = [tokens_alone(request) for request in others]
    known = {
        token_id
        for request, output in zip(others, expected, strict=True)
        for token_id in (*request.prompt_token_ids, *output)
    }
    bad = min(set(range(CONFIG.vocab_size)) - known)
    requests[1].prompt_token_ids[1] = bad
    weights = model().embed_tokens.weight
    kept = weights[bad].clone()
    weights[bad] = torch.nan
    try:
        clock = VirtualClock()
        run(BATCHING[batching](LIMITS, clock), ContiguousExecutor(model(), 3, 64), requests, clock)
    finally:
        weights[bad] = kept
    assert requests[1].finish_reason == "error" and "not finite" in requests[1].stop_reason
    assert not requests[1].output_token_ids
    assert [tuple(request.output_token_ids) for request in others] == expected


@pytest.mark.parametrize("rows", [[1, 2, 3], [3, 0], [2]])
def test_rows_are_read_where_they_were_written(rows):
    cache = RowCache(CONFIG, 4, 8, torch.float64)
    torch.manual_seed(0)
    k, v = torch.randn(2, 2 * len(rows), 2, 16).double()
    places = cache.places(torch.tensor(rows).repeat_interleave(2), torch.tensor([0, 1] * len(rows)))
    cache.store(1, places, k, v)
    keys, values = cache.read(1, rows, 2)  # [B, Hkv, 2, D]
    assert torch.equal(keys.transpose(1, 2).flatten(0, 1), k) and torch.equal(values.transpose(1, 2).flatten(0, 1), v)
    assert (keys.data_ptr() >= cache.keys.data_ptr() and rows != [3, 0]) == (
        keys.untyped_storage().data_ptr() == cache.keys.untyped_storage().data_ptr()
    )


def test_requests_drawn_together_draw_what_each_would_alone_and_never_the_impossible():
    torch.manual_seed(0)
    logits = torch.randn(6, 50)
    logits[:, ::2] = -torch.inf
    params = [SamplingParams(temperature=1.0 + (row % 2), seed=row) for row in range(6)]
    states = [SamplingState.of(each, 50) for each in params]
    for draw in range(200):
        drawn = sample(logits, states, [draw] * 6)
        each = [sample(logits[row : row + 1], states[row : row + 1], [draw]) for row in range(6)]
        assert torch.equal(drawn, torch.cat(each)) and (drawn % 2 == 1).all()
