"""Ids of an LLM's engine, whatever happens: used again, refused while in use, aborted, also while `generate` runs.

What a request says by itself is known beforehand: one that gets another's tokens, loses some or comes back twice is
found, and so is an id that is free too late or too early, in any table.
"""

from collections import Counter

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test

from minillm import LLM, SamplingParams
from minillm.engine.outputs import OUTPUT_KINDS
from minillm.errors import PromptError
from minillm.simulation.reporting import report
from tiny_models import random_token_ids

NAMES = ["a", "b", "a.1", "req 3"]  # "a.1" is what the second output of "a" is called inside, "req 3" what an LLM uses
PROMPTS = [random_token_ids(length, 190, length) for length in (2, 5, 9)]
LENGTHS = (1, 4, 9)


class LLMMachine(RuleBasedStateMachine):
    """Requests of the engine's caller beside those of `generate` and `stream`, which step for all."""

    llm: LLM
    alone: dict  # prompt and length -> tokens
    seen = Counter()

    @initialize()
    def begin(self):
        self.engine = self.llm.engine
        self.living = {}  # id -> (kind, prompt, length, n, tokens told so far of each output)
        self.streams = []
        self.num_steps = 0
        self.abort_after = None  # so many steps, whoever makes them
        right = self.launch = self.engine.executor.launch

        def launch(plan):
            self.num_steps += 1
            if self.abort_after is not None and self.num_steps >= self.abort_after[0]:
                (_, which), self.abort_after = self.abort_after, None
                running = sorted({part.request_id for part in plan.scheduled} & set(self.engine._states))
                if running:
                    self.abort(running[which % len(running)])
            return right(plan)

        self.engine.executor.launch = launch

    @rule(
        name=st.sampled_from(NAMES),
        prompt=st.integers(0, 2),
        length=st.sampled_from(LENGTHS),
        n=st.sampled_from([1, 1, 2]),
        kind=st.sampled_from(OUTPUT_KINDS),
    )
    def add(self, name, prompt, length, n, kind):
        params = SamplingParams(temperature=1e-4, seed=0, n=n, max_tokens=length, ignore_eos=True)
        inside = {f"{each}.1" for each, told in self.living.items() if told[3] == 2}
        if name in self.living or name in inside or (n == 2 and f"{name}.1" in self.living):
            with pytest.raises(PromptError, match="in use"):
                self.engine.add_request(name, PROMPTS[prompt], params, output_kind=kind)
            self.seen["refused"] += 1
            return
        self.engine.add_request(name, PROMPTS[prompt], params, output_kind=kind)
        self.living[name] = (kind, prompt, length, n, [[] for _ in range(n)])
        self.seen["added"] += 1

    @rule(count=st.sampled_from([1, 2, 5]))
    def step(self, count):
        for _ in range(count):
            self.take(self.engine.step())

    @rule(kind=st.sampled_from(OUTPUT_KINDS))
    def add_again_when_the_first_output_has_ended(self, kind):
        for name in list(self.living):
            self.abort(name)
        self.add("a", 1, 4, 2, kind)
        while "a" in self.living and not self.engine._states["a"].completions[0].finish_reason:
            self.step(1)
        if "a" in self.living:
            self.seen["one of two has ended"] += 1
            self.add("a", 0, 4, 1, kind)

    @rule(name=st.sampled_from(NAMES))
    def abort_one(self, name):
        assert self.engine.is_unfinished(name) == (name in self.living)
        if name in self.living:
            self.abort(name)
        assert not self.engine.abort_request(name)

    @rule(prompts=st.lists(st.integers(0, 2), min_size=1, max_size=3), after=st.integers(1, 9), which=st.integers(0, 5))
    def generate(self, prompts, after, which):
        """Somebody aborts one of all that run when so many steps have been made."""
        self.abort_after = (self.num_steps + after, which)
        params = SamplingParams(max_tokens=9, ignore_eos=True)
        before, right = dict(self.living), self.engine.step

        def step():
            outputs = right()
            self.take([output for output in outputs if output.request_id in before])
            return outputs

        self.engine.step = step
        try:
            outputs = self.llm.generate([PROMPTS[each] for each in prompts], params, use_tqdm=False)
        finally:
            del self.engine.step
            self.abort_after = None
        for prompt, output in zip(prompts, outputs, strict=True):
            (completion,) = output.outputs
            expected = self.alone[prompt, 9]
            assert output.finished and completion.token_ids == expected[: len(completion.token_ids)]
            assert completion.finish_reason == ("length" if len(completion.token_ids) == 9 else "abort")
            self.seen[f"generate: {completion.finish_reason}"] += 1

    def abort(self, name):
        assert self.engine.abort_request(name)
        self.living.pop(name, None)
        self.seen["abort"] += 1

    def take(self, outputs):
        for output in outputs:
            kind, prompt, length, n, told = self.living[output.request_id]
            for each in output.outputs:
                so_far = told[each.index]
                told[each.index] = so_far + each.token_ids if kind == "delta" else each.token_ids
                assert kind != "final_only" or output.finished
                assert told[each.index] == self.alone[prompt, length][: len(told[each.index])]
            if output.finished:
                assert [len(each) for each in told] == [length] * n
                del self.living[output.request_id]
                self.seen[f"told: {kind}"] += 1

    @invariant()
    def every_table_knows_the_living_alone(self):
        if hasattr(self, "engine"):
            assert set(self.engine._states) == set(self.living)
            known = {request_id for state in self.engine._states.values() for request_id in inside(state)}
            assert set(self.engine._completions) <= known and self.engine._silent <= known
            assert set(self.engine.scheduler._unfinished) == set(self.engine._completions)
            assert not self.llm._takers

    def teardown(self):
        if not hasattr(self, "engine"):
            return
        self.engine.executor.launch = self.launch
        for name in list(self.engine._states):
            self.engine.abort_request(name)
        self.engine.step()
        assert self.engine.scheduler.block_manager.usage.used == 0
        trace = self.engine.trace
        assert len({record.request_id for record in trace.requests}) == len(trace.requests)
        assert report(trace).num_requests == len(trace.requests)


def inside(state):
    return [completion.request.request_id for completion in state.completions]


@pytest.mark.parametrize("ahead", [False, True], ids=["sync", "async"])
def test_ids_have_one_life_at_a_time_whatever_happens(checkpoint, ahead):
    limits = {"num_blocks": 30, "block_size": 4, "max_model_len": 24, "max_num_seqs": 4, "max_num_batched_tokens": 8}
    folder, seen = checkpoint("llama"), Counter()
    with LLM(folder, dtype="float64", skip_tokenizer_init=True, verbose=False, async_scheduling=ahead, **limits) as llm:
        alone = {}
        for length in LENGTHS:
            params = SamplingParams(max_tokens=length, ignore_eos=True)
            for number, output in enumerate(llm.generate(PROMPTS, params, use_tqdm=False)):
                alone[number, length] = output.outputs[0].token_ids
        machine = type("Machine", (LLMMachine,), {"llm": llm, "alone": alone, "seen": seen})
        run_state_machine_as_test(
            machine,
            settings=settings(
                max_examples=25,
                stateful_step_count=20,
                derandomize=True,
                database=None,
                deadline=None,
                phases=(Phase.generate,),
                suppress_health_check=list(HealthCheck),
            ),
        )
    paths = {"added", "refused", "one of two has ended", "abort", "generate: length", "generate: abort"}
    paths |= {f"told: {kind}" for kind in OUTPUT_KINDS}
    assert paths <= set(+seen), f"the machine did not get everywhere: {paths - set(+seen)}, {seen}"
