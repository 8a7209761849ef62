"""The README's pictures: `python -m minillm.viz.figures [FOLDER]` draws them again, the same bytes every time."""

import sys
from pathlib import Path

from minillm.viz.base import Picture
from minillm.viz.grids import MaskGrid
from minillm.viz.timeline import Timeline

FOLDER = Path(__file__).parents[2] / "figures"
RUNNING_EXAMPLE = "Once upon a time, there was"
TOKENS = ("Once", " upon", " a", " time", ",", " there", " was")
NUM_OUTPUT_TOKENS = 12


def causal_mask() -> Picture:
    """Which token may look at which, among the seven tokens of the course's running example."""
    from minillm.attention import causal

    return MaskGrid(causal(len(TOKENS)), TOKENS, title="A token sees itself and what came before")


def batching() -> Picture:
    """A run of the course's 64 requests under static and continuous batching, with the same model, cache and places."""
    from minillm import load_model
    from minillm.engine import SchedulerConfig
    from minillm.ladder import ContiguousExecutor
    from minillm.simulation import compare_batching, course_requests
    from minillm.viz.places import Places

    model, _ = load_model("storyteller")
    requests = course_requests(vocab_size=model.config.num_sampled_ids)
    config = SchedulerConfig(max_num_seqs=16, max_num_batched_tokens=512, max_model_len=512)
    runs = compare_batching(
        requests, config, lambda: ContiguousExecutor(model, 16, 512), batching=["static", "continuous"]
    )
    static, continuous = (run.trace for run in runs.values())
    title = (
        f"The same {len(requests)} requests in 16 places: {len(static.steps)} forward passes with "
        f"static batching, {len(continuous.steps)} with continuous batching"
    )
    return Places({"static": static, "continuous": continuous}, title=title)


def timeline() -> Picture:
    """The storyteller continues the running example; drawn in steps, so that the picture does not depend on times."""
    from minillm import SamplingParams, encode, generate_cached, load_model, token_texts

    model, tokenizer = load_model("storyteller")
    params = SamplingParams(max_tokens=NUM_OUTPUT_TOKENS, ignore_eos=True)
    result = generate_cached(model, encode(tokenizer, RUNNING_EXAMPLE), params, tokenizer=tokenizer)
    tokens = {result.trace.requests[0].request_id: token_texts(tokenizer, result.token_ids, result.prompt_token_ids)}
    title = f"The prompt's {len(result.prompt_token_ids)} tokens in one pass, then one token per pass"
    return Timeline(result.trace, unit="steps", sampled_tokens=tokens, title=title)


def block_tables() -> Picture:
    """The running example and another request in blocks of 4 tokens, while their tokens are written."""
    from minillm.viz.block_replay import PoolState
    from minillm.viz.blocks import BlockTables

    other = ("In", " a", " house", " by", " the")
    tables, num_tokens = {"A": [5, 2], "B": [3, 6]}, {"A": len(TOKENS), "B": len(other)}
    state = PoolState(block_size=4, num_blocks=8, tables=tables, num_tokens=num_tokens)
    return BlockTables(state, tokens={"A": TOKENS, "B": other}, title="Two requests in a pool of blocks")


def memory_access() -> Picture:
    """One load of keys by a warp in versions 1 and 2 of the CUDA kernel, recorded by its emulation on the CPU."""
    import torch

    from minillm.kernels import emulator
    from minillm.viz.base import stacked
    from minillm.viz.memory_access import WarpAccess

    pool = torch.zeros(2, 3, 16, 2, 64, dtype=torch.float16)  # keys and values, [blocks, places, Hkv, D] each
    arguments = torch.zeros(1, 4, 64, dtype=torch.float16), *pool, torch.tensor([[1, 2]]), torch.tensor([32])
    loads = []
    for version, what in ((1, "a thread takes a key"), (2, "a warp takes a key")):
        _, traffic = emulator.run("decode", *arguments, version=version)
        loads.append(WarpAccess.of_traffic(traffic, "keys", title=f"Version {version}: {what}"))
    return stacked(loads, share_x=False)


FIGURES = {
    "batching.svg": batching,
    "block_tables.svg": block_tables,
    "causal_mask.svg": causal_mask,
    "memory_access.svg": memory_access,
    "timeline.svg": timeline,
}


def draw_figures(folder: Path = FOLDER) -> list[Path]:
    """Write every figure of the README into `folder`; returns the paths."""
    folder.mkdir(parents=True, exist_ok=True)
    return [make().save(folder / name) for name, make in FIGURES.items()]


if __name__ == "__main__":
    for path in draw_figures(*map(Path, sys.argv[1:2])):
        print(path.name)
