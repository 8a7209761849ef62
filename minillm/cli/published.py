"""The command `minillm 24x`: vLLM's published factor over transformers of 2023, simulated and split into causes."""

import argparse
import json
from dataclasses import asdict
from pathlib import Path

from minillm.errors import ConfigError, check_number, check_options, write_text

DEFAULT_REQUESTS = 500  # outputs; the number of prompts is this divided by `--outputs`


def add_published_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--setting", default="13b", choices=["13b", "7b"], help="on an A100 40 GB, or an A10G 24 GB")
    parser.add_argument("--outputs", type=int, default=1, choices=[1, 3], help="of each prompt")
    parser.add_argument("--requests", type=int, metavar="N", help=f"prompts; by default {DEFAULT_REQUESTS} / outputs")
    parser.add_argument("--rows", type=int, help="of the baseline's batch; by default as many as fit the memory")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--factors-only", action="store_true", help="no band, no verdict; takes a third of the time")
    parser.add_argument("--load", metavar="R,R", help="instead: both sides at these prompts per second (Poisson)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything")
    parser.add_argument("--svg", type=Path, metavar="FILE", help="draw the factors")


def run_published(arguments: argparse.Namespace) -> int:
    """Simulate, print, and write files if asked. Raises ConfigError for bad values."""
    from minillm.simulation import Assumptions, Published

    check_options(arguments, at_least_one=("requests", "rows"), files=("json", "svg"))
    rates = None if arguments.load is None else rates_of(arguments.load)
    published = Published(
        arguments.setting,
        Assumptions(rows=arguments.rows),
        num_requests=arguments.requests or max(1, DEFAULT_REQUESTS // arguments.outputs),
        n=arguments.outputs,
        seed=arguments.seed,
    )
    content = {"setting": setting_of(published)}
    print(setting_text(published))
    if rates:
        content["load"] = load(published, rates)
    else:
        content |= factors(published, arguments.svg)
        if not arguments.factors_only:
            content |= judged(published)
    if arguments.json:
        write_text(arguments.json, json.dumps(content, indent=2) + "\n")
    return 0


def setting_of(published) -> dict:
    """The simulated setting, for JSON."""
    prompts, outputs = zip(*published.lengths, strict=True)
    return {
        "name": published.setting.name,
        "num_requests": len(prompts),
        "n": published.n,
        "mean_prompt": sum(prompts) / len(prompts),
        "mean_output": sum(outputs) / len(outputs),
        "cache_tokens": published.num_cache_tokens,
        "assumptions": asdict(published.assumptions),
        "seed": published.seed,
    }


def setting_text(published) -> str:
    """The setting as text, and the use of the card's memory."""
    said = setting_of(published)
    return (
        f"{said['name']}, {said['num_requests']} prompts, outputs each: {said['n']}\n"
        f"on average {said['mean_prompt']:.0f} tokens in and {said['mean_output']:.0f} out\n\n{published.ledger}\n"
    )


def factors(published, svg: Path | None) -> dict:
    """Print and return the factors of the total."""
    from minillm.simulation import CAUSES, CLAIMED
    from minillm.viz import Waterfall

    parts = published.decomposition()
    picture = Waterfall.of(
        parts,
        first="our engine",
        last="transformers of 2023",
        claim=CLAIMED[published.n],
        title=f"{published.setting.name}: times as slow, by cause",
    )
    speeds = {"engine": published.output_tokens_per_second(()), "baseline": published.output_tokens_per_second(CAUSES)}
    print(f"{speeds['engine']:.0f} output tokens/s against {speeds['baseline']:.0f}, in batches of", end=" ")
    print(f"{published.num_rows(CAUSES)}\n\n{picture.text()}\n")
    if svg:
        picture.save(svg)
    named = {" + ".join(sorted(causes)): seconds for causes, seconds in parts.seconds.items()}
    return {
        "output_tokens_per_second": speeds,
        "total": parts.total,
        "factors": [asdict(factor) for factor in parts.factors],
        "seconds": named,
    }


def judged(published) -> dict:
    """Print and return the band, the verdict, and published measurements."""
    from minillm.simulation import CAUSES, observations, sensitivity, verdict
    from minillm.viz import text_table

    bands, seen, found = sensitivity(published), observations(), verdict(published)
    rows = [[band.what, band.low, f"{band.at_low:.1f}", band.high, f"{band.at_high:.1f}"] for band in bands]
    print(text_table(["assumption", "lower", "factor", "higher", "factor"], rows))
    rows = [
        [each.what, f"{each.measured:.4g}", f"{each.simulated:.4g}", f"{each.ratio:.2f}" + " fitted" * each.is_fitted]
        for each in seen
    ]
    print("\n" + text_table(["what others measured", "measured", "simulated", "ratio"], rows))
    low, high = found.claimed
    baselines = [
        f"{each.rows} rows, {each.launches_per_layer} launches per layer, "
        f"{'copying' if each.copying else 'in place'}: {each.factor:.1f}"
        for each in found.holds
    ]
    threes = [f"{causes}: {factor:.1f}" for causes, factor in found.about_three.items()]
    without = [f"{cause} ({CAUSES[cause]}): {factor:.1f}" for cause, factor in found.without.items()]
    for title, lines in (
        (f"within {low:g} to {high:g} against baselines of", baselines),
        ("about 3 against a baseline with only", threes),
        ("against a baseline without", without),
    ):
        print("\n".join(["", title, *(f"  {line}" for line in lines or ["none"])]))
    print(
        f"\nPagedAttention alone is {found.paged_share:.0%} of the {found.total:.1f} in logarithms, "
        f"{found.total / found.not_paged:.1f} times; all else {found.not_paged:.1f} times\n"
        f"if our side were as far from its least time as vLLM was measured: {found.as_measured[0]:.1f} to "
        f"{found.as_measured[1]:.1f} times"
    )
    seen_too = [asdict(each) | {"ratio": each.ratio} for each in seen]
    return {"band": [asdict(band) for band in bands], "observations": seen_too, "verdict": found.as_dict()}


def rates_of(text: str) -> list[float]:
    """Prompts per second, from "0.1,0.5,2". Raises ConfigError for anything else."""
    try:
        return [
            check_number("--load", float(rate), "above 0, as in 0.1,0.5,2", lambda r: r > 0) for rate in text.split(",")
        ]
    except ValueError as error:
        raise ConfigError(f"--load is {text!r}; give numbers of prompts per second, as in 0.1,0.5,2") from error


def load(published, rates: list[float]) -> dict:
    """Print and return both sides under Poisson arrivals at these rates."""
    from minillm.simulation import under_load
    from minillm.viz import text_table

    runs, rows = under_load(published, rates), []
    for rate in rates:
        both = [runs[side][rate] for side in ("baseline", "engine")]
        speeds = [each.output_tokens_per_second for each in both]
        latencies = [f"{each.e2e.p50:.1f} s" for each in both]
        rows.append([f"{rate:g}", *(f"{speed:.0f}" for speed in speeds), f"{speeds[1] / speeds[0]:.1f}", *latencies])
    header = ["prompts/s", "baseline tokens/s", "engine tokens/s", "factor", "baseline E2E p50", "engine E2E p50"]
    print(text_table(header, rows))
    return {side: {str(rate): run.as_dict() for rate, run in of_rates.items()} for side, of_rates in runs.items()}
