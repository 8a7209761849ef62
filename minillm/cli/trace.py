"""`minillm trace FILE`: draws the trace of any run in the terminal, or as a figure, a page, or a file for Perfetto."""

import argparse
from collections import Counter
from dataclasses import replace
from pathlib import Path

from minillm.errors import check_options

MOST_REQUESTS = 40  # rows drawn unless more are asked for
UNITS = ("s", "steps", "tokens")


def add_trace_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", type=Path, help="a trace as `save_trace` writes it: JSON lines")
    parser.add_argument("--unit", default="steps", choices=UNITS, help="the unit of the axis; s is to scale")
    parser.add_argument(
        "--requests", type=int, default=MOST_REQUESTS, metavar="N", help=f"draw the first N ({MOST_REQUESTS})"
    )
    parser.add_argument("--request", metavar="ID", help="print the path of one request through the layers")
    parser.add_argument("--svg", type=Path, metavar="FILE", help="write the timeline as a figure")
    parser.add_argument("--png", type=Path, metavar="FILE", help="the same as PNG")
    parser.add_argument("--html", type=Path, metavar="FILE", help="write a file that plays the whole run in a browser")
    parser.add_argument("--chrome", type=Path, metavar="FILE", help="write the whole trace for ui.perfetto.dev")


def run_trace(arguments: argparse.Namespace) -> int:
    """Print the timeline and the run's numbers; write the requested files."""
    from minillm.player import save_html
    from minillm.simulation import report
    from minillm.trace import journey_lines, load_trace, save_chrome_trace
    from minillm.viz import Timeline

    check_options(arguments, at_least_one=("requests",), files=("svg", "png", "html", "chrome"))
    trace = load_trace(arguments.file)
    if arguments.request is not None:
        print("\n".join(journey_lines(trace, arguments.request)))
        return 0
    picture = Timeline(beginning(trace, arguments.requests), arguments.unit)
    print(picture.text())
    if len(trace.requests) > len(picture.request_ids):
        print(f"the first {len(picture.request_ids)} of {len(trace.requests):,} requests; --requests N draws more")
    print("\n".join(["", str(report(trace)), *block_lines(trace)]))
    for path, form in ((arguments.svg, picture.svg), (arguments.png, picture.png)):
        if path is not None:
            path.write_bytes(form())
            print(f"wrote {path}")
    if arguments.html is not None:
        print(f"wrote {save_html(trace, arguments.html, title=arguments.file.name)}; open it in a browser")
    if arguments.chrome is not None:
        print(f"wrote {save_chrome_trace(trace, arguments.chrome)}; open it in https://ui.perfetto.dev")
    return 0


def block_lines(trace) -> list[str]:
    """Lines on a paged pool: its fullest step, its end, preemptions, copies; none without a pool."""
    from minillm.viz import plural

    steps = [step for step in trace.steps if step.blocks is not None]
    preempted = [each for step in trace.steps for each in step.preempted]
    copies = sum(len(step.copied_blocks) for step in trace.steps)
    lines = []
    if steps:
        fullest, last = max(steps, key=lambda step: step.blocks.used), steps[-1].blocks
        lines.append(
            f"blocks        {last.total} in the pool, at most {fullest.blocks.used} used "
            f"({fullest.blocks.used / last.total:.1%}), in step {fullest.step}; "
            f"at the end {last.used} used, {last.cached} cached, {last.free} free"
        )
    if steps or preempted:
        modes = Counter(each.mode for each in preempted)
        again = sum(part.num_tokens for step in trace.steps for part in step.scheduled if part.why == "recompute")
        lines.append(
            f"preemptions   {len(preempted)}: {modes['recompute']} by recomputation ({plural(again, 'token')} "
            f"computed again), {modes['swap']} by swapping"
        )
    if copies:
        lines.append(f"copies        {plural(copies, 'shared block')} copied before being written to")
    return lines


def beginning(trace, num_requests: int):
    """The trace of only its first requests, up to the last step in which one of them takes part."""
    requests = trace.requests[: max(1, num_requests)]
    wanted = {record.request_id for record in requests}
    busy = [i for i, step in enumerate(trace.steps) if any(part.request_id in wanted for part in step.scheduled)]
    return replace(trace, requests=requests, steps=trace.steps[: busy[-1] + 1] if busy else trace.steps)
