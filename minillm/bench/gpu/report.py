"""A record of `minillm bench gpu` as text. Reads only the record."""

from collections.abc import Iterable, Iterator, Mapping

from minillm.bench.gpu.session import KIND, SPEED

GAPS = ("refused", "skipped", "error")  # reasons why an entry has no results


def table(record: Mapping) -> str:
    """Everything that was measured, and at the end the entries that were not, with the reasons."""
    parts = record["parts"]
    sections = [
        heading(record),
        ceilings(parts.get("ceilings", {})),
        *kernels(parts.get("kernels", {})),
        *(workload(name, parts[name]) for name in ("w1", "w2", "w3") if name in parts),
        *ablation(parts.get("ablation", {})),
        gaps(parts),
    ]
    if record["kind"] != KIND:
        sections = [record["kind"], *sections, record["kind"]]
    return "\n\n".join(section for section in sections if section)


def heading(record: Mapping) -> str:
    """Machine, date and versions."""
    machine, versions = record["machine"], record.get("versions", {})
    return (
        f"{machine.get('gpu') or machine.get('processor')}, driver {machine.get('driver')}, {record['date']}\n"
        + ", ".join(f"{name} {version}" for name, version in versions.items())
    )


def ceilings(part: Mapping) -> str:
    copy, gemm = part.get("copy", {}), part.get("gemm", {})
    if "bytes_per_second" not in copy or "flops" not in gemm:
        return ""
    return f"ceilings: copy {copy['bytes_per_second'] / 1e12:.2f} TB/s, GEMM {gemm['flops'] / 1e12:.0f} TFLOP/s"


# --- kernels ---------------------------------------------------------------------------------------------------------


def kernels(part: Mapping) -> Iterator[str]:
    decode, prefill, sweep = (part.get(name, {}) for name in ("decode", "prefill", "sweep"))
    if decode:
        yield "decode attention, requests x context: share of the copy ceiling\n" + grid(decode, decode_figure)
    if prefill:
        yield "prefill attention: TFLOP/s\n" + grid(prefill, prefill_figure)
    measured = {case: cells for case, cells in sweep.items() if "bytes_per_second" in cells.get("default", {})}
    if lines := [sweep_line(case, cells) for case, cells in measured.items()]:
        yield "Triton decode, launch parameters\n" + "\n".join(lines)


def decode_figure(cell: Mapping) -> str:
    return f"{cell['share_of_copy']:.0%}" if "share_of_copy" in cell else gap(cell)


def prefill_figure(cell: Mapping) -> str:
    return f"{cell['flops_per_second'] / 1e12:.1f}" if "flops_per_second" in cell else gap(cell)


def gap(cell: Mapping) -> str:
    """One word for an entry without results."""
    return next((name for name in GAPS if name in cell), "-")


def grid(rows: Mapping[str, Mapping[str, Mapping]], figure) -> str:
    """Rows of cells with a header."""
    columns = list(dict.fromkeys(name for cells in rows.values() for name in cells))
    widths = [max(9, len(name) + 2) for name in columns]
    lines = [" " * 24 + "".join(f"{name:>{width}}" for name, width in zip(columns, widths, strict=True))]
    for label, cells in rows.items():
        figures = (figure(cells.get(name, {})) for name in columns)
        lines.append(f"{label:24}" + "".join(f"{text:>{width}}" for text, width in zip(figures, widths, strict=True)))
    return "\n".join(lines)


def sweep_line(case: str, cells: Mapping[str, Mapping]) -> str:
    speeds = {label: cell["bytes_per_second"] for label, cell in cells.items() if "bytes_per_second" in cell}
    best = max(speeds, key=speeds.get)
    gain = speeds[best] / speeds["default"] - 1
    return f"{case}: best of {len(speeds)} is {best}, {speeds[best] / 1e9:.0f} GB/s, {gain:+.1%} against the default"


# --- workloads -------------------------------------------------------------------------------------------------------


def workload(name: str, part: Mapping) -> str:
    """One of W1, W2, W3: every shape, with our engine and the others."""
    asked = part.get("workload", {})
    lines = [
        f"{name.upper()}: {asked.get('requests')} requests, {asked.get('prompt_tokens')} prompt and "
        f"{asked.get('output_tokens')} output tokens"
    ]
    for shape, entries in engines_of(part):
        limit = entries.get("minillm", {}).get("roofline_output_tokens_per_second")
        lines.append(f"{shape}" + (f", at most {limit:.0f} output tokens/s at these ceilings" if limit else ""))
        lines += [engine_line(label, entry) for label, entry in entries.items()]
    return "\n".join(lines)


def engines_of(part: Mapping) -> Iterator[tuple[str, Mapping]]:
    """Shape and its entries."""
    for name, entries in part.items():
        if name != "workload" and isinstance(entries, dict):
            yield name, entries


def engine_line(label: str, entry: Mapping) -> str:
    if SPEED not in entry:
        return f"  {label:44}{gap(entry)}"
    runs = len(entry["seconds"])
    line = f"  {label:44}{entry[SPEED]:>9.1f} output tokens/s ({runs} run{'s' * (runs > 1)})"
    if "roofline_share" in entry:
        line += f", {entry['roofline_share']:.1%} of the roofline"
    if entry.get("step_on_device_share"):
        line += f", a step on the device {entry['step_on_device_share']:.0%} of the time"
    if pages := entry.get("settings", {}).get("pages_and_budget"):
        line += f", with {pages}"
    if "minillm_is_faster_by" in entry:
        line += f", minillm {entry['minillm_is_faster_by']:.2f}x"
    if "speed_of_all_on" in entry:
        line += f", {entry['speed_of_all_on']:.2f} of all on"
    if entry.get("subset", "all") != "all":
        line += f" [{entry['subset']}]"
    return line


def ablation(part: Mapping) -> Iterator[str]:
    for shape, entries in engines_of(part):
        yield f"W1 on {shape}, one thing changed at a time\n" + "\n".join(
            engine_line(label, entry) for label, entry in entries.items()
        )


# --- what is missing -------------------------------------------------------------------------------------------------


def gaps(parts: Mapping) -> str:
    """The reasons why entries have no results, each once."""
    reasons: dict[str, list[str]] = {}
    for path, reason in find_gaps(parts):
        reasons.setdefault(reason, []).append(path)
    lines = [f"  {named(paths)}: {reason}" for reason, paths in reasons.items()]
    return "\n".join(["not measured", *lines]) if lines else ""


def find_gaps(node: Mapping, path: tuple[str, ...] = ()) -> Iterable[tuple[str, str]]:
    """Path and reason of every entry without results."""
    for name in GAPS:
        if isinstance(node.get(name), str):
            yield " / ".join(path), f"{name}: {node[name]}"
    for key, value in node.items():
        if isinstance(value, dict):
            yield from find_gaps(value, (*path, key))


def named(paths: list[str]) -> str:
    return paths[0] if len(paths) == 1 else f"{paths[0]} and {len(paths) - 1} more"
