"""Sampling draws from the distribution its parameters describe, request by request; bad parameters are refused."""

import dataclasses
import json
import math
from dataclasses import fields, replace
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from minillm import LLM, ModelConfig, SamplingParams, generate_cached, generate_ragged
from minillm.engine.request import Request
from minillm.engine.scheduler import SchedulerConfig
from minillm.errors import SamplingParamsError
from minillm.kernels.cpu import unusable
from minillm.ladder.contiguous import ContiguousExecutor
from minillm.model.decoder import Decoder
from minillm.sampling import SamplingState, next_token_probabilities, sample, token_logprobs
from minillm.sampling.params import limited
from minillm.simulation.clock import RealClock
from minillm.simulation.running import BATCHING, run
from tiny_models import ScriptedModel, random_token_ids

LOGITS = torch.tensor([2.0, 0.5, -1.0, 3.0, 1.5, -4.0, 0.0, 2.5])


def sample_all(logits, params):
    """[R, V] logits -> [R] tokens: token after token of one request with these parameters."""
    state = SamplingState.of(params, logits.shape[-1])
    return sample(logits, [state] * len(logits), range(len(logits)))


distinct_logits = st.lists(st.integers(-80, 80), min_size=2, max_size=30, unique=True).map(
    lambda values: torch.tensor(values) / 10
)
temperatures = st.sampled_from([0.3, 0.7, 1.0, 1.8])


def probabilities_in_plain_python(logits, temperature, top_k, top_p, min_p):
    """The definition, token by token: softmax, then min-p, top-k and top-p, each on what is left, made to sum to 1."""
    weights = {token: math.exp(logit / temperature) for token, logit in enumerate(logits)}
    likeliest = max(weights.values())
    weights = {token: w for token, w in weights.items() if w >= min_p * likeliest}
    by_weight = sorted(weights, key=weights.get, reverse=True)[: top_k if top_k > 0 else None]
    total, kept, reached = sum(weights[token] for token in by_weight), [], 0.0
    for token in by_weight:
        if reached >= top_p:
            break
        kept.append(token)
        reached += weights[token] / total
    total = sum(weights[token] for token in kept)
    return [weights[token] / total if token in kept else 0.0 for token in range(len(logits))]


# --- the distribution ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("top_k", [0, -1, 1, 3, 100])
@pytest.mark.parametrize("top_p", [1.0, 0.9, 0.4, 0.01])
@pytest.mark.parametrize("min_p", [0.0, 0.2, 1.0])
def test_probabilities_are_those_of_the_definition(temperature, top_k, top_p, min_p):
    params = SamplingParams(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    expected = probabilities_in_plain_python(LOGITS.tolist(), temperature, top_k, top_p, min_p)
    assert next_token_probabilities(LOGITS, params).tolist() == pytest.approx(expected, abs=1e-6)


@given(
    logits=distinct_logits,
    temperature=temperatures,
    top_k=st.integers(0, 12),
    top_p=st.floats(0.001, 1.0),
    min_p=st.floats(0.0, 1.0),
)
def test_filters_only_shrink_the_support_and_always_keep_the_likeliest(logits, temperature, top_k, top_p, min_p):
    everything = next_token_probabilities(logits, SamplingParams(temperature=temperature))
    params = SamplingParams(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    filtered = next_token_probabilities(logits, params)
    kept = filtered > 0
    assert filtered.sum().item() == pytest.approx(1.0, abs=1e-5)
    assert kept[logits.argmax()]
    assert kept.sum() <= (top_k or len(logits))
    assert not kept[everything < min_p * everything.max() * (1 - 1e-4)].any()
    assert torch.allclose(
        filtered[kept] / everything[kept], (1 / everything[kept].sum()).expand(int(kept.sum())), rtol=1e-3
    )


def test_lower_temperature_sharpens():
    likeliest = [
        next_token_probabilities(LOGITS, SamplingParams(temperature=t)).max().item() for t in (2.0, 1.0, 0.5, 0.01)
    ]
    assert likeliest == sorted(likeliest)
    assert likeliest[-1] == pytest.approx(1.0)


def test_greedy_takes_the_likeliest():
    params = SamplingParams()
    assert params.greedy
    assert sample_all(LOGITS[None], params).tolist() == [3]
    assert sample_all(LOGITS[None], SamplingParams(top_k=3, min_p=0.1)).tolist() == [3]
    assert next_token_probabilities(LOGITS, params).tolist() == [0, 0, 0, 1, 0, 0, 0, 0]


@pytest.mark.parametrize("temperature", [1e-300, 1e-40, 1e-6])
def test_a_temperature_next_to_zero_is_greedy_instead_of_overflowing(temperature):
    params = SamplingParams(temperature=temperature)
    assert sample_all(LOGITS[None], params).tolist() == [3]


def test_a_single_candidate_is_always_drawn():
    for params in (SamplingParams(temperature=5.0, top_k=1), SamplingParams(temperature=5.0, top_p=1e-6)):
        assert set(sample_all(LOGITS.repeat(50, 1), params).tolist()) == {3}


# --- ties ------------------------------------------------------------------------------------------------------------

TIED = torch.tensor([0.0, 2.0, 1.0, 2.0, 1.0, 2.0, 1.0])
DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("filters", "kept"),
    [
        ({"top_k": 1}, [1]),
        ({"top_k": 2}, [1, 3]),
        ({"top_k": 4}, [1, 2, 3, 5]),
        ({"top_p": 0.01}, [1]),
        ({"top_p": 0.4}, [1, 3]),  # each of the likeliest has 0.24
        ({"min_p": 1.0}, [1, 3, 5]),
        ({"min_p": 1.0, "top_k": 2}, [1, 3]),
        ({"top_k": 4, "top_p": 0.95}, [1, 2, 3, 5]),
    ],
)
def test_of_equal_logits_the_lower_ids_stay(dtype, filters, kept):
    for temperature in (0.3, 1.0) if "top_p" not in filters else (1.0,):
        params = SamplingParams(temperature=temperature, **filters)
        both = next_token_probabilities(torch.stack([TIED, TIED.flip(0)]).to(dtype), params)
        assert both[0].nonzero()[:, 0].tolist() == kept
        assert len(both[1].nonzero()) == len(kept)  # the last of the equals are now the first


@pytest.mark.parametrize("dtype", DTYPES)
def test_one_candidate_is_the_greedy_one_in_every_dtype(dtype):
    """Values a rounding apart: at float32's precision, or after the division, some are equal."""
    spread = torch.finfo(dtype).eps
    logits = torch.tensor(1.98, dtype=dtype) + spread * torch.randint(
        3, (200, 40), generator=torch.Generator().manual_seed(0)
    ).to(dtype)
    greedy = sample_all(logits, SamplingParams()).tolist()
    assert greedy == logits.argmax(-1).tolist() and len(set(greedy)) > 3
    for temperature in (0.7, 1.0, 1.9):  # divided by 1.9, neighbours are half a rounding apart
        for one in ({"top_k": 1}, {"top_p": 1e-9}, {"top_k": 1, "min_p": 1.0}):
            params = SamplingParams(temperature=temperature, **one)
            assert sample_all(logits, params).tolist() == greedy
    assert next_token_probabilities(logits, SamplingParams()).argmax(-1).tolist() == greedy


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("weights", "top_p", "num_kept"),
    [
        ([2, 1, 1], 0.5, 1),
        ([2, 1, 1], 0.51, 2),
        ([2, 1, 1], 0.75, 2),
        ([5, 3, 2], 0.5, 1),
        ([5, 3, 2], 0.8, 2),
        ([7, 3], 0.7, 1),
        ([1] * 10, 0.3, 3),
        ([1] * 10, 0.7, 7),
        ([1] * 7, 3 / 7, 3),
    ],
)
def test_top_p_met_exactly_is_reached(dtype, weights, top_p, num_kept):
    for shift in (0.0, 3.3, -20.0):
        logits = torch.tensor(weights, dtype=torch.float64).log().add(shift).to(dtype)
        kept = next_token_probabilities(logits, SamplingParams(temperature=1.0, top_p=top_p)).nonzero()[:, 0]
        assert kept.tolist() == list(range(num_kept))


def test_a_logit_that_is_no_number_is_not_filtered_away():
    logits = torch.tensor([1.0, math.nan, 3.0, 2.0])
    for filters in ({"top_k": 2}, {"top_p": 0.5}, {"min_p": 0.5}):
        assert next_token_probabilities(logits, SamplingParams(temperature=1.0, **filters)).isnan().any()


# --- log-probabilities -----------------------------------------------------------------------------------------------


def test_the_rank_of_equally_likely_tokens_is_the_best_of_their_places():
    """1 plus the number of likelier ones; the likeliest are listed with the lower id first."""
    params = [SamplingParams(logprobs=k) for k in (0, 2, 3, 5, 7, 20)]
    sampled = torch.tensor([5, 5, 0, 6, 2, 1])
    found = token_logprobs(TIED.repeat(6, 1), params, sampled)
    assert [found[row].rank for row in range(6)] == [1, 1, 7, 4, 4, 1]
    order = [1, 3, 5, 2, 4, 6, 0]
    assert [list(found[row].top_ids) for row in range(6)] == [order[: each.logprobs] for each in params]
    expected = TIED.log_softmax(-1)
    for row in range(6):
        assert found[row].logprob == pytest.approx(expected[sampled[row]].item())
        assert list(found[row].top_logprobs) == pytest.approx(expected[list(found[row].top_ids)].tolist())


def test_log_probabilities_keep_float64():
    logits = torch.tensor([[0.0, 1e-12]], dtype=torch.float64)
    (entry,) = token_logprobs(logits, [SamplingParams(logprobs=1)], torch.tensor([0])).values()
    assert entry.rank == 2 and entry.top_ids == [1]


def chi_square(counts, probabilities) -> float:
    expected = probabilities * counts.sum()
    return ((counts - expected) ** 2 / expected).sum().item()


def test_draws_follow_the_distribution():
    """Chi-square with 7 degrees of freedom: the right distribution exceeds 24.3 once in a thousand seeds."""
    params = SamplingParams(temperature=1.3, seed=0)
    counts = sample_all(LOGITS.repeat(4000, 1), params).bincount(minlength=8).double()
    assert chi_square(counts, next_token_probabilities(LOGITS, params)) < 24.3
    slightly_wrong = next_token_probabilities(LOGITS, SamplingParams(temperature=1.5))
    assert chi_square(counts, slightly_wrong) > 24.3  # the test can tell


# --- seeds -----------------------------------------------------------------------------------------------------------


def draw(logits, params, neighbours=(), position=0, steps=30):
    """`steps` tokens of one request that sits at `position` among neighbours, which draw too."""
    requests = [*neighbours[:position], params, *neighbours[position:]]
    states = [SamplingState.of(request, len(logits)) for request in requests]
    rows = torch.randn(len(requests), len(logits), generator=torch.Generator().manual_seed(5))
    rows[position] = logits
    return [int(sample(rows, states, [step] * len(rows))[position]) for step in range(steps)]


def test_a_seeded_request_draws_the_same_whatever_its_neighbours_do():
    params = SamplingParams(temperature=1.0, seed=42)
    neighbours = [SamplingParams(temperature=2.0, seed=1), SamplingParams(), SamplingParams(temperature=0.5)]
    alone = draw(LOGITS, params)
    assert len(set(alone)) > 3
    for position in range(4):
        assert draw(LOGITS, params, neighbours, position) == alone
    assert draw(LOGITS, SamplingParams(temperature=1.0, seed=43)) != alone


def test_requests_without_a_seed_draw_differently():
    params = SamplingParams(temperature=2.0)
    assert draw(LOGITS, params) != draw(LOGITS, params)  # equal by chance once in 10^20


# --- the same on every path ------------------------------------------------------------------------------------------

ASKED = [{}, {"top_k": 9, "min_p": 0.01}, {"top_p": 0.8, "repetition_penalty": 1.3}, {"seed": -7, "min_tokens": 5}]
PARAMS = [SamplingParams(**{"temperature": 1.3, "seed": 5, "max_tokens": 7} | asked) for asked in ASKED]
PROMPTS = [random_token_ids(2 + 4 * i, 190, seed=i) for i in range(len(PARAMS))]


def by_contiguous_executor(model, folder):
    limits, clock = SchedulerConfig(max_num_seqs=3, max_num_batched_tokens=8, max_model_len=64), RealClock()
    requests = [
        Request(f"r{i}", *each, eos_token_ids=model.config.eos_token_ids)
        for i, each in enumerate(zip(PROMPTS, PARAMS, strict=True))
    ]
    run(BATCHING["continuous"](limits, clock), ContiguousExecutor(model, 3, 64), requests, clock)
    return [tuple(request.output_token_ids) for request in requests]


def by_engine(backend, dtype="float64"):
    def generate(model, folder):
        if backend == "cpu" and (why := unusable(getattr(torch, dtype), 16, 2)):
            pytest.skip(why)
        if backend == "triton":
            pytest.importorskip("triton", reason="Triton is not installed; `make setup` does on Linux x86_64")
        config = {"max_num_seqs": 3, "max_num_batched_tokens": 12, "num_blocks": 20, "max_model_len": 64}
        llm = LLM(folder, dtype=dtype, attention_backend=backend, skip_tokenizer_init=True, verbose=False, **config)
        assert llm.engine.executor.workers[0].backend.name == backend
        return [tuple(output.outputs[0].token_ids) for output in llm.generate(PROMPTS, PARAMS, use_tqdm=False)]

    return generate


PATHS = {
    "ragged": lambda model, folder: [result.token_ids for result in generate_ragged(model, PROMPTS, PARAMS)],
    "contiguous": by_contiguous_executor,
    "reference": by_engine("reference"),
    "cpu": by_engine("cpu"),
    "cpu, float32": by_engine("cpu", "float32"),
    "triton, float32": by_engine("triton", "float32"),
}


@pytest.mark.parametrize("path", PATHS)
def test_the_same_seed_says_the_same_on_every_path(path, load, checkpoint):
    model = load("llama-mqa", torch.float64)
    alone = [generate_cached(model, *each).token_ids for each in zip(PROMPTS, PARAMS, strict=True)]
    assert PATHS[path](model, checkpoint("llama-mqa")) == alone
    assert all(len(set(token_ids)) > 3 for token_ids in alone), "they were drawn"


def test_the_n_th_output_is_that_of_the_seed_plus_n(load, checkpoint):
    """Whatever path: the seed alone tells them apart."""
    model, params = load("llama-mqa", torch.float64), SamplingParams(temperature=1.3, seed=5, max_tokens=8)
    llm = LLM(checkpoint("llama-mqa"), dtype="float64", skip_tokenizer_init=True, verbose=False, num_blocks=20)
    (output,) = llm.generate([PROMPTS[1]], replace(params, n=3), use_tqdm=False)
    for i, completion in enumerate(output.outputs):
        alone = generate_cached(model, PROMPTS[1], replace(params, seed=5 + i))
        assert tuple(completion.token_ids) == alone.token_ids


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_the_ladder_refuses_what_is_not_finite(temperature):
    """Rather than to feed -1 to the model."""
    model = ScriptedModel([7])
    model.logits = lambda hidden: torch.full((*hidden.shape[:-1], 1000), math.nan)
    for generate in (generate_cached, lambda model, prompt, params: generate_ragged(model, [prompt], params)):
        with pytest.raises(FloatingPointError, match="not finite"):
            generate(model, [1, 2], SamplingParams(temperature=temperature))


# --- the vocabulary's padding ----------------------------------------------------------------------------------------


def test_padding_of_the_vocabulary_gets_no_logits():
    config = ModelConfig(
        vocab_size=16,
        hidden_size=4,
        intermediate_size=4,
        num_hidden_layers=1,
        num_attention_heads=1,
        num_key_value_heads=1,
        head_dim=4,
        max_position_embeddings=8,
        num_tokens=11,
        tie_word_embeddings=True,
    )
    model = Decoder(config)
    with torch.no_grad():
        model.embed_tokens.weight[:] = 0.0
        model.embed_tokens.weight[11:] = 100.0  # padding rows would win every time
        logits = model.logits(torch.ones(2, 4))
    assert logits.shape == (2, 11)


# --- bad parameters --------------------------------------------------------------------------------------------------

NAN, INF = math.nan, math.inf


@pytest.mark.parametrize(
    ("field", "value", "limit"),
    [
        ("temperature", -0.1, "0 for greedy or a positive number"),
        ("temperature", NAN, "0 for greedy or a positive number"),
        ("temperature", INF, "0 for greedy or a positive number"),
        ("top_k", -2, "0 or -1 for no limit"),
        ("top_k", 2.5, "whole number"),
        ("top_p", 0.0, r"\(0, 1\]"),
        ("top_p", -0.5, r"\(0, 1\]"),
        ("top_p", 1.01, r"\(0, 1\]"),
        ("top_p", NAN, r"\(0, 1\]"),
        ("min_p", -0.1, r"\[0, 1\]"),
        ("min_p", 1.1, r"\[0, 1\]"),
        ("min_p", NAN, r"\[0, 1\]"),
        ("max_tokens", 0, "at least 1"),
        ("max_tokens", -3, "at least 1"),
        ("max_tokens", 1.5, "at least 1"),
        ("max_tokens", True, "at least 1"),
        ("seed", 2**64, "64 bits"),
        ("seed", "one", "64 bits"),
        ("temperature", "0.7", "a positive number"),
        ("temperature", True, "a positive number"),
        ("top_k", "5", "whole number"),
        ("top_p", "0.9", r"\(0, 1\]"),
        ("min_p", b"0.1", r"\[0, 1\]"),
        ("presence_penalty", 2.01, "from -2 to 2"),
        ("frequency_penalty", -2.01, "from -2 to 2"),
        ("frequency_penalty", NAN, "from -2 to 2"),
        ("repetition_penalty", 0.0, "a positive number"),
        ("repetition_penalty", INF, "a positive number"),
        ("repetition_penalty", "1.1", "a positive number"),
        ("logit_bias", [1, 2], "a dict from token ids to numbers"),
        ("logit_bias", {"5": 1.0}, "whole number, at least 0"),
        ("logit_bias", {-1: 1.0}, "whole number, at least 0"),
        ("logit_bias", {5: NAN}, "a number from -1e30 to 1e30"),
        ("logit_bias", {5: "1"}, "a number from -1e30 to 1e30"),
        ("min_tokens", -1, "at least 0"),
        ("min_tokens", 1.0, "at least 0"),
        ("include_stop_str_in_output", 1, "False, True"),
        ("ignore_eos", "no", "False, True"),
        ("ignore_eos", 0.0, "False, True"),
        ("n", 0, "at least 1"),
        ("n", "2", "at least 1"),
        ("logprobs", 21, "from 0 to 20, or None"),
        ("logprobs", True, "from 0 to 20, or None"),
        ("prompt_logprobs", -1, "from 0 to 20, or None"),
        ("stop", 5, "a list of texts"),
        ("stop", {"a": 1}, "a list of texts"),
        ("stop", b"end", "a list of texts"),
        ("stop_token_ids", 5, "a list of token ids"),
    ],
)
def test_a_bad_parameter_is_refused_with_its_value_and_limit(field, value, limit):
    with pytest.raises(SamplingParamsError, match=limit) as error:
        SamplingParams(**{field: value})
    assert field in str(error.value)
    if not isinstance(value, dict):
        assert str(value)[:20] in str(error.value)


@pytest.mark.parametrize(
    ("field", "limits", "beyond"),
    [
        ("temperature", [0.0, 1e9], [-1e-9]),
        ("top_k", [-1, 0, 1], [-2]),
        ("top_p", [1e-9, 1.0], [0.0, math.nextafter(1, 2)]),
        ("min_p", [0.0, 1.0], [-1e-9, math.nextafter(1, 2)]),
        ("presence_penalty", [-2.0, 2.0], [math.nextafter(-2, -3), math.nextafter(2, 3)]),
        ("frequency_penalty", [-2.0, 2.0], [math.nextafter(-2, -3), math.nextafter(2, 3)]),
        ("repetition_penalty", [1e-30, 1e30], [0.9e-30, 1.1e30]),
        ("logit_bias", [{0: 1e30}, {1: -1e30}], [{0: 1.1e30}, {1: -1.1e30}, {-1: 1.0}]),
        ("min_tokens", [0, 1], [-1]),
        ("max_tokens", [1], [0]),
        ("seed", [-(2**63), 2**63 - 1], [-(2**63) - 1, 2**63]),
        ("n", [1], [0]),
        ("logprobs", [0, 20], [-1, 21]),
        ("prompt_logprobs", [0, 20], [-1, 21]),
    ],
)
def test_a_limit_itself_is_accepted_and_nothing_beyond(field, limits, beyond):
    for value in limits:
        assert getattr(SamplingParams(**{field: value}), field) == value
    for value in beyond:
        with pytest.raises(SamplingParamsError, match=field):
            SamplingParams(**{field: value})


def test_the_seeds_of_all_outputs_have_64_bits():
    assert SamplingParams(seed=2**63 - 3, n=3, temperature=1).n == 3
    with pytest.raises(SamplingParamsError, match=f"seed {2**63 - 2} . 2 for the last of n = 3"):
        SamplingParams(seed=2**63 - 2, n=3, temperature=1)


def test_an_empty_stop_string_is_refused():
    with pytest.raises(SamplingParamsError, match="empty string"):
        SamplingParams(stop=("end", ""))


def test_a_stop_string_that_is_no_str_is_refused():
    for stop in ([1], ["end", None]):
        with pytest.raises(SamplingParamsError, match="must be a str; ids belong in stop_token_ids"):
            SamplingParams(stop=stop)


def test_stop_ids_that_are_no_whole_numbers_are_refused():
    for stop in ("5", [1.5], ["5"], [True], [-1], [None]):
        with pytest.raises(SamplingParamsError, match=r"stop_token_ids(\[0\])? is"):
            SamplingParams(stop_token_ids=stop)


def test_one_stop_string_may_be_given_bare():
    assert SamplingParams(stop="end").stop_strings == ("end",)
    assert SamplingParams(stop=["end"]).stop_strings == ("end",)


def test_none_is_not_given_in_every_field():
    names = [field.name for field in fields(SamplingParams)]
    assert SamplingParams(**dict.fromkeys(names)) == SamplingParams()


def test_what_can_be_read_once_is_read_once_and_kept():
    params = SamplingParams(stop=(text for text in ["a", "b"]), stop_token_ids=iter([3, 4]))
    assert params.stop == params.stop_strings == ("a", "b")
    assert params.stop_token_ids == (3, 4)
    assert replace(params, n=1) == params
    assert SamplingParams(stop={"a"}, stop_token_ids={3}) == SamplingParams(stop=["a"], stop_token_ids=np.array([3]))


def test_who_changes_logits_and_who_penalizes():
    asked = [{}, {"logprobs": 1}, {"prompt_logprobs": 0}, {"min_tokens": 1}, {"logit_bias": {1: 1.0}}]
    asked += [{"presence_penalty": -1}, {"frequency_penalty": 0.5}, {"repetition_penalty": 1.1}]
    told = [(each.changes_logits, each.penalizes) for each in (SamplingParams(**a) for a in asked)]
    no, changes = (False, False), (True, False)
    assert told == [no, no, no, changes, changes, *[(True, True)] * 3]


def test_what_nobody_asks_for_is_off():
    params = SamplingParams()
    assert (params.ignore_eos, params.include_stop_str_in_output, params.n, params.min_tokens) == (False, False, 1, 0)
    assert (params.stop, params.stop_token_ids, params.logprobs, params.prompt_logprobs) == ((), (), None, None)


def test_parameters_are_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        SamplingParams().top_k = 5


def test_what_the_caller_changes_later_changes_nothing():
    stop, bias = ["a"], {5: 1.0}
    params = SamplingParams(stop=stop, logit_bias=bias)
    stop.append("b")
    bias[6] = 2.0
    assert params.stop == ("a",) and params.logit_bias == {5: 1.0}


def test_numbers_of_numpy_become_pythons():
    given = {
        "temperature": np.float32(0.5),
        "top_k": np.int64(3),
        "top_p": np.float64(0.5),
        "presence_penalty": np.int8(1),
        "repetition_penalty": Fraction(3, 2),
        "logit_bias": {np.int32(7): np.float16(0.5)},
        "max_tokens": np.uint8(9),
        "stop_token_ids": [np.int64(5)],
        "ignore_eos": np.True_,
        "seed": np.int64(-1),
        "logprobs": np.int16(2),
    }
    params = SamplingParams(**given)
    plain = {int: 1, float: 1.0, bool: True, tuple: (), dict: {}}
    values = [*(getattr(params, name) for name in given), *params.stop_token_ids, *params.logit_bias.items()]
    assert {type(value) for value in values} == set(map(type, plain.values()))
    assert json.dumps([getattr(params, name) for name in given])
    assert (params.seed, params.repetition_penalty, params.logit_bias) == (-1, 1.5, {7: 0.5})


def test_more_tokens_at_least_than_at_most_are_refused():
    assert SamplingParams(min_tokens=3, max_tokens=3).min_tokens == 3
    with pytest.raises(SamplingParamsError, match="min_tokens is 4, above max_tokens = 3"):
        SamplingParams(min_tokens=4, max_tokens=3)
    with pytest.raises(SamplingParamsError, match="min_tokens is 4, above max_tokens = 3"):
        limited(SamplingParams(min_tokens=4), 7, 10)


def test_bad_words_are_refused_by_name():
    with pytest.raises(TypeError, match="bad_words"):
        SamplingParams(bad_words=["damn"])
