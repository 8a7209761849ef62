"""Chapter 3, the KV cache: attention with one, the loop around it, appending in place, its bytes, and a puzzle."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from minillm.attention import masked_attention, masks
from minillm.checks.base import Case, CheckFailed, call, describe, failure, realised, run_check, same_value
from minillm.costs import LLAMA_2_7B, LLAMA_2_70B, LLAMA_3_8B, QWEN3_0_6B, kv_bytes_per_token
from minillm.ladder import CausalAttention
from minillm.model import Decoder, ModelConfig

# --- cached_attend ---------------------------------------------------------------------------------------------------


class Passes:
    """The passes of one case: (text, layer, new tokens) each. Texts are strangers; each has a dict of its own."""

    def __init__(self, *passes: tuple[int, int, int]):
        self.passes = passes

    def __repr__(self) -> str:
        texts = len({text for text, _, _ in self.passes})
        steps = [f"{num} token{'s' * (num > 1)} in layer {layer}" for _, layer, num in self.passes]
        return f"passes: {', '.join(steps)}" + f"; of {texts} texts in turn" * (texts > 1)


def cached_attend(function: Callable) -> None:
    """`cached_attend(kept, layer, q, k, v)` -> [T, Hq, D], attention over all tokens so far; `kept` is a dict."""
    cases = [
        ([(0, 0, 3)], "Nothing is kept yet: three new tokens under the causal mask."),
        ([(0, 0, 3), (1, 0, 3)], "Another dict is another text: remember nothing outside `kept`."),
        ([(0, 0, 3), (0, 0, 1)], "The fourth token attends to all four: join k and v to what `kept` holds of layer 0."),
        ([(0, 0, 3), (0, 0, 1), (0, 0, 1)], "Keep the joined keys and values, not only those of the last pass."),
        ([(0, 0, 3), (0, 1, 3), (0, 0, 1), (0, 1, 1)], "Each layer has keys and values of its own: kept[layer]."),
        ([(0, 0, 3), (0, 0, 2)], "Two new tokens: the first of them must not see the second. Take the last two rows."),
        (
            [(0, 0, 3), (1, 0, 3), (0, 0, 1), (1, 0, 1)],
            "Another dict is another text: remember nothing outside `kept`.",
        ),
    ]
    run_check(
        "cached_attend",
        lambda passes: _attended(function, passes)[-1],
        [Case((Passes(*passes),), _attended(_all_again, Passes(*passes))[-1], hint) for passes, hint in cases],
    )


def _attended(function: Callable, passes: Passes) -> list[Any]:
    """What the function returns in each pass. 4 query heads share 2 KV heads of 8 numbers."""
    kept: dict[int, dict] = {}
    draw = torch.Generator().manual_seed(3)
    outputs = []
    for text, layer, num in passes.passes:
        q, k, v = (torch.randn(num, heads, 8, generator=draw) for heads in (4, 2, 2))
        outputs.append(function(kept.setdefault(text, {}), layer, q, k, v))
    return outputs


def _all_again(kept: dict, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The expected answer, without a cache: every pass attends for all tokens again and gives the new rows."""
    kept[layer] = [torch.cat(pair) for pair in zip(kept.get(layer, [q[:0], k[:0], v[:0]]), (q, k, v), strict=True)]
    return masked_attention(*kept[layer], masks.causal(len(kept[layer][0])))[-len(q) :]


# --- generate_with_cache ---------------------------------------------------------------------------------------------

NUM_IDS = 11


class Generated(NamedTuple):
    """What the reader's loop returned, and what it gave the model."""

    tokens: Any
    passes: list[tuple[list[int], list[int]]]  # ids and positions of each
    with_attend: int  # passes that were handed the `attend` of the call


class ScriptedModel:
    """Stands in for a decoder: the next token follows from the last one and its position, and passes are noted."""

    def __init__(self):
        self.passes: list[tuple[list[int], list[int]]] = []
        self.with_attend = 0

    def __repr__(self) -> str:
        return "model"

    def __call__(self, token_ids: Tensor, positions: Tensor, attend: Callable) -> Tensor:
        self.passes.append((token_ids.tolist(), positions.tolist()))
        rows = torch.zeros(len(token_ids), 1, 1)
        self.with_attend += torch.equal(attend(0, rows, rows, rows), rows + 1)
        return torch.stack([token_ids, positions], dim=1).double()  # [T, hidden]

    def logits(self, hidden: Tensor) -> Tensor:
        best = (3 * hidden[..., 0] + hidden[..., 1] + 1).long() % NUM_IDS
        return torch.nn.functional.one_hot(best, NUM_IDS).double()


class Attend:
    """Stands in for an `attend`."""

    def __repr__(self) -> str:
        return "attend"

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return q + 1


def generate_with_cache(function: Callable) -> None:
    """`generate_with_cache(model, prompt_ids, num_outputs, attend)` -> the new tokens; counts what passes the model."""
    calls = [([5, 1, 4], 1), ([5, 1, 4], 3), ([2], 4), ([7, 7, 0, 9, 3, 3, 1], 6)]
    hint = "The next token is the argmax of the logits of the last row; return the new tokens, without the prompt."
    cases = [
        Case(
            (ScriptedModel(), prompt, num, Attend()),
            _generated(_reference_loop, ScriptedModel(), prompt, num, Attend()),
            hint,
        )
        for prompt, num in calls
    ]
    run_check(
        "generate_with_cache",
        lambda *args: _generated(function, *args),
        cases,
        same=_same_generated,
        show=_show_generated,
        advise=_on_passes,
    )


def _generated(function: Callable, model: ScriptedModel, prompt_ids: list, num: int, attend: Attend) -> Generated:
    tokens = realised(function(model, list(prompt_ids), num, attend))
    return Generated(tokens, model.passes, model.with_attend)


def _reference_loop(model: ScriptedModel, prompt_ids: list[int], num_outputs: int, attend: Callable) -> list[int]:
    token_ids, computed = list(prompt_ids), 0
    for _ in range(num_outputs):
        hidden = model(torch.tensor(token_ids[computed:]), torch.arange(computed, len(token_ids)), attend)
        computed = len(token_ids)
        token_ids.append(int(model.logits(hidden[-1]).argmax()))
    return token_ids[len(prompt_ids) :]


def _same_generated(got: Generated, expected: Generated) -> bool:
    return same_value(got.tokens, expected.tokens) and got[1:] == expected[1:]


def _show_generated(got: Generated) -> str:
    passes = ", ".join(f"{ids} at {positions}" for ids, positions in got.passes)
    passes = passes if len(passes) < 200 else passes[:197] + "…"
    others = len(got.passes) - got.with_attend
    return f"tokens {describe(got.tokens)}; passes: {passes or 'none'}" + f"; {others} without your `attend`" * (
        others > 0
    )


def _on_passes(got: Generated, case: Case) -> str | None:
    """What is wrong with the passes: the first of these that fits."""
    _, prompt, num, _ = case.args
    if got.with_attend < len(got.passes):
        return "Hand `attend` to the model in every pass: it holds the old keys and values."
    if any(len(ids) != len(positions) for ids, positions in got.passes):
        return "Every token of a pass has one position."
    if got.passes and got.passes[0][0] != prompt:
        return "The first pass computes the whole prompt, all its tokens at once."
    if any(len(ids) != 1 for ids, _ in got.passes[1:]):
        return "After the prompt, feed one token per pass: the one that is not in the cache yet."
    if any(positions != ours[1] for (_, positions), ours in zip(got.passes, case.expected.passes, strict=False)):
        return "Positions go on counting: the first token after a prompt of n tokens stands at position n."
    if len(got.passes) > num:
        return f"{num} new tokens take {num} passes: the last token is sampled and never fed back."
    return None


# --- cache_append ----------------------------------------------------------------------------------------------------


class Appended(NamedTuple):
    """What one call of `cache_append` left behind."""

    length: Any  # what it returned; REFUSED if it raised because of an overflow
    keys: Tensor  # [capacity, Hkv, D]
    values: Tensor  # [capacity, Hkv, D]


REFUSED = "an exception"


def cache_append(function: Callable) -> None:
    """`cache_append(keys, values, length, k, v)` -> the new length; writes in place, or refuses and writes nothing."""
    run_check("cache_append", _observed(function), _append_cases(), same=_same_append, show=_show_append)


def _append_cases() -> Iterator[Case]:
    overflow = (
        "Compare length + k.shape[0] with keys.shape[0] before the first write, and raise if it is more. "
        "(A slice that ends early can swallow a row without a word.)"
    )
    yield _append_case(4, 2, 1, "Write behind the cached rows, into the tensors given: keys[length:length + new] = k.")
    yield _append_case(6, 0, 3, "Into an empty cache (length 0) three new tokens go to the rows 0, 1 and 2.")
    yield _append_case(4, 1, 3, "Three tokens behind one just fill a capacity of 4: that is allowed.")
    yield _append_case(3, 1, 2, "Any number of heads, any head size: index the first dimension only.", heads=2, dim=3)
    yield _append_case(4, 2, 0, "No new token: nothing to write, and the length stays.")
    yield _append_case(4, 4, 1, overflow)
    yield _append_case(4, 2, 3, overflow)


def _append_case(capacity: int, length: int, new: int, hint: str, heads: int = 1, dim: int = 2) -> Case:
    """Old keys are 1, 2, 3, ..., new ones go on from there plus 10; values are the negatives; free rows hold 0."""
    numbers = torch.arange(1.0, 1 + (length + new) * heads * dim).view(length + new, heads, dim)
    old, k = numbers[:length], numbers[length:] + 10
    free = torch.zeros(max(0, capacity - length), heads, dim)
    keys = torch.cat([old, free])
    if length + new > capacity:
        expected = Appended(REFUSED, keys, -keys)
    else:
        after = torch.cat([old, k, free[new:]])
        expected = Appended(length + new, after, -after)
    return Case((keys, -keys, length, k, -k), expected, hint)


def _observed(function: Callable) -> Callable:
    """The reader's function and what it did to the cache; an exception is a refusal only if the rows do not fit."""

    def observed(keys: Tensor, values: Tensor, length: int, k: Tensor, v: Tensor) -> Appended:
        try:
            returned = function(keys, values, length, k, v)
        except Exception as error:
            if isinstance(error, NotImplementedError) or length + k.shape[0] <= keys.shape[0]:
                raise
            returned = REFUSED
        return Appended(returned, keys, values)

    return observed


def _same_append(got: Appended, expected: Appended) -> bool:
    same_rows = torch.equal(got.keys, expected.keys) and torch.equal(got.values, expected.values)
    return same_rows and same_value(got.length, expected.length)


def _show_append(outcome: Appended) -> str:
    returned = REFUSED if outcome.length is REFUSED else f"length {describe(outcome.length)}"
    return f"{returned}; keys {_rows(outcome.keys)}; values {_rows(outcome.values)}"


def _rows(cache: Tensor) -> str:
    """One bracket per token, its heads joined: [1 2] [3 4] [0 0]."""
    return " ".join("[" + " ".join(f"{number + 0.0:g}" for number in row) + "]" for row in cache.flatten(1).tolist())


# --- cache_bytes -----------------------------------------------------------------------------------------------------


def cache_bytes(function: Callable) -> None:
    """`cache_bytes(config, num_tokens, dtype_bytes)` -> bytes of the keys and values of so many tokens."""
    both = "Every token has a key *and* a value in each layer: head_dim numbers for each KV head."
    heads = "Count KV heads (num_key_value_heads), not query heads: only keys and values are kept."
    size = "Take config.head_dim as it is; it need not be hidden_size / num_attention_heads."
    calls = [
        ((LLAMA_2_7B, 1, 2), both),
        ((LLAMA_2_7B, 1000, 2), "A thousand tokens take a thousand times the bytes of one."),
        ((LLAMA_2_7B, 10 * 500, 2), "Return bytes, not MB or MiB."),
        ((LLAMA_2_70B, 1, 2), heads),
        ((LLAMA_3_8B, 8192, 1), "Use dtype_bytes: here a number takes a single byte."),
        ((QWEN3_0_6B, 1, 4), size),
        ((QWEN3_0_6B, 0, 4), "No tokens, no cache."),
    ]
    cases = [Case((_Shape(c), num, dtype), num * kv_bytes_per_token(c, dtype), hint) for (c, num, dtype), hint in calls]
    run_check("cache_bytes", lambda shape, *rest: function(shape.config, *rest), cases)


class _Shape:
    """A model's shape with a name that fits into a line."""

    def __init__(self, config: ModelConfig):
        self.config = config

    def __repr__(self) -> str:
        c = self.config
        return (
            f"<{c.num_hidden_layers} layers, {c.num_attention_heads} query heads, {c.num_key_value_heads} KV heads, "
            f"head_dim {c.head_dim}>"
        )


# --- score_endings ---------------------------------------------------------------------------------------------------

PUZZLE = ([9, 4, 1, 7, 7], [[3, 5, 8, 2], [3, 5, 8, 6], [3, 5, 1], [2, 2, 2, 2, 2], [2, 2, 4], [3, 5, 8, 2, 9], [11]])


class CountingModel:
    """A small random decoder that notes the positions of every pass. Chapter 4 reads with it too."""

    def __init__(self):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.decoder = Decoder(ModelConfig(24, 16, 24, 2, 4, 2, 8, max_position_embeddings=64)).double()
            for parameter in self.decoder.parameters():
                torch.nn.init.normal_(parameter, std=0.3)
        self.config, self.dtype, self.device = self.decoder.config, torch.float64, torch.device("cpu")
        self.passes: list[list[int]] = []

    def __repr__(self) -> str:
        return "model"

    @property
    def tokens(self) -> int:
        """How many passed through it."""
        return sum(map(len, self.passes))

    @torch.no_grad()
    def __call__(self, token_ids: Tensor, positions: Tensor, attend: Callable) -> Tensor:
        self.passes.append(positions.tolist())
        return self.decoder(token_ids, positions, attend)

    @torch.no_grad()
    def logits(self, hidden: Tensor) -> Tensor:
        return self.decoder.logits(hidden)


def score_endings(function: Callable) -> None:
    """`score_endings(model, prompt_ids, endings)` -> log-probability of each ending; then the budget of the puzzle.

    The budget: no token may pass the model twice where the same tokens stand before it, and no last token at all.
    """
    calls = [
        (
            ([9, 4, 1], [[3, 5]]),
            "Add up the log-probabilities of the ending's tokens, each given all tokens before it.",
        ),
        (([9, 4, 1], [[3]]), "One token: its log-probability behind the prompt, from log_softmax of the logits."),
        (([9, 4, 1], [[3, 5], [2, 5]]), "The second ending follows the prompt, not the first ending."),
        (([9], [[3, 5, 1], [3, 5], [3, 5]]), "An ending may be the beginning of another, or the same one again."),
        (PUZZLE, "Add up the log-probabilities of the ending's tokens, each given all tokens before it."),
    ]
    for args, hint in calls:
        model = CountingModel()
        case = Case((model, *args), _log_probabilities(model, *args), hint)
        model.passes.clear()

        def counted(model: CountingModel, *rest) -> tuple[Any, int]:
            return realised(function(model, *rest)), model.tokens

        scores, tokens = call("score_endings", counted, case, describe)
        if not same_value(scores, case.expected):
            raise CheckFailed(failure("score_endings", case, f"got       {describe(scores)}", describe(case.expected)))
    budget = _fewest_tokens(*PUZZLE)
    if tokens > budget:
        case = Case(case.args, None, "What several endings begin with is computed once; keep a copy of `kept` there.")
        raise CheckFailed(failure("score_endings", case, f"got       {tokens} tokens computed", f"at most {budget}"))
    alone = sum(len(PUZZLE[0]) + len(ending) - 1 for ending in PUZZLE[1])
    print(f"✓ score_endings: {len(calls)} cases, and the puzzle: {tokens} tokens computed, {alone} one by one")


def _log_probabilities(model: CountingModel, prompt_ids: list[int], endings: Iterable[Sequence[int]]) -> list[float]:
    """Each ending by itself and without a cache."""
    scores = []
    for ending in endings:
        token_ids = torch.tensor([*prompt_ids, *ending])
        hidden = model(token_ids, torch.arange(len(token_ids)), CausalAttention(model.config))
        rows = model.logits(hidden[len(prompt_ids) - 1 : -1]).log_softmax(-1)  # [len(ending), ids]
        scores.append(float(sum(row[token_id] for row, token_id in zip(rows, ending, strict=True))))
    return scores


def _fewest_tokens(prompt_ids: list[int], endings: Iterable[Sequence[int]]) -> int:
    """The prompt, and every different beginning of an ending that something follows."""
    return len(prompt_ids) + len({tuple(ending[:length]) for ending in endings for length in range(1, len(ending))})
