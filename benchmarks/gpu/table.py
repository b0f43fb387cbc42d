"""The GPU report as Markdown, from its JSON and nothing else."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

from benchmarks.gpu.goals import HEADER, convolution_floor, goal_lines

COMMAND = "python -m benchmarks.gpu_report"
MODE_HEADER = ("dtype", "compiled", "CUDA graph")

Items = dict[str, dict[str, Any]]


def markdown(result: dict[str, Any], further: Mapping[str, dict[str, Any]] | None = None) -> str:
    """The goals, then all that was measured, part by part; what is missing or failed says so.

    further: results of other programs on the same GPU that goals are about, by their source.
    """
    parts = {name: part["items"] for name, part in result["parts"].items()}
    blocks = ["# GPU report", f"Measured by `{COMMAND}`."]
    if result["smoke"]:
        blocks.append("A smoke run on a CPU at toy size: these numbers mean nothing.")
    else:
        blocks += ["## Goals", table(HEADER, goal_lines({"report": result, **(further or {})}))]
    for name, part in result["parts"].items():
        good = {item: value for item, value in part["items"].items() if not {"error", "unavailable"} & value.keys()}
        blocks += [f"## {name}", *_state(part)]
        blocks += list(_writer(name, parts)(good)) if good else []
        blocks += _speedups(name, parts)
    return "\n\n".join(blocks) + "\n"


def _state(part: dict[str, Any]) -> list[str]:
    reasons = {item: value.get("error") or value.get("unavailable") for item, value in part["items"].items()}
    errors = [f"- {item}: {reason}" for item, reason in reasons.items() if reason]
    head = [] if part["status"] == "done" else [f"**{part['status']}**: {part['error']}"]
    return head + (["\n".join(errors)] if errors else [])


def _writer(name: str, parts: dict[str, Items]) -> Any:
    writers = {"environment": _environment, "ceilings": _ceilings, "correctness": _correctness, "kernels": _kernels}
    writers |= {"sampler": _sampler, "training": _training, "peers": _peers}
    writers["breakdown"] = partial(_breakdown, parts.get("ceilings", {}))
    return writers.get(name, _steps)


def table(header: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """A Markdown table."""
    return "\n".join(f"| {' | '.join(line)} |" for line in (header, ["---"] * len(header), *lines))


def _environment(items: Items) -> Iterator[str]:
    facts = items["environment"]
    rows = {"device": facts["device"], **(facts["gpu"] or {}).get("state", {}), "CUDA": facts["cuda"], "cuDNN": facts["cudnn"]}
    rows |= {"Python": facts["python"], **facts["packages"], "commit": facts["commit"], "time": facts["time"]}
    yield table(("what", "value"), [(name, str(value)) for name, value in rows.items()])


def _ceilings(items: Items) -> Iterator[str]:
    lines = []
    if "copy" in items:
        lines.append(("copy", f"{items['copy']['bytes_per_s'] / 1e12:.3f} TB/s"))
    if "matmul bf16" in items:
        lines.append(("matmul bf16", f"{items['matmul bf16']['flops_per_s'] / 1e12:.1f} TFLOP/s"))
    for name, value in items.items():
        if name.startswith("conv "):
            for kind in ("fprop", "dgrad", "wgrad"):
                rate = f"{value[f'{kind}_ms']:.2f} ms, {value[f'{kind}_flops_per_s'] / 1e12:.1f} TFLOP/s"
                lines.append((f"{name} {kind}, batch {value['batch']}, all of one pass", rate))
    yield table(("ceiling", "measured"), lines)


def _correctness(items: Items) -> Iterator[str]:
    yield table(("tests", "result"), [(name, value["summary"].strip("= ")) for name, value in items.items()])


def _kernels(items: Items) -> Iterator[str]:
    header = ("op", "pass", "shapes", "shape", "backend", "kernel us", "call us", "of copy", "error")
    lines = [line for value in items.values() for line in map(_kernel_line, value["rows"]) if line]
    yield table(header, sorted(lines))


def _kernel_line(row: dict[str, Any]) -> tuple[str, ...] | None:
    head = (row["op"], row["pass"], row["shapes"], row["shape"], row["backend"])
    if row["status"] == "unavailable":
        return None
    if row["status"] != "ok":
        return (*head, row["status"], "", "", row["reason"].replace("|", "/"))
    kernel = f"{row['kernel']['median_us']:.1f}" if row["kernel"] else "-"
    return (*head, kernel, f"{row['call']['median_us']:.1f}", f"{row['copy_share']:.2f}", f"{row['relative_error']:.0e}")


def _steps(items: Items) -> Iterator[str]:
    header = ("step", *MODE_HEADER, "images/s", "ms", "p20-p80", "peak GiB", "launches", "kernels", "kernel ms", "warm-up s")
    yield table(header, [_step_line(name, value) for name, value in items.items()])


def mode_cells(value: dict[str, Any]) -> tuple[str, ...]:
    """In which precision something ran, whether compiled, and whether replayed as a graph."""
    dtype = value["dtype"] + ", TF32" * value.get("tf32", False)
    return (dtype, *("yes" if value[key] else "no" for key in ("compiled", "cuda_graph")))


def _step_line(name: str, value: dict[str, Any]) -> tuple[str, ...]:
    step, peak = value["step_ms"], value["peak_memory_bytes"]
    return (
        f"{name}, batch {value['batch']}",
        *mode_cells(value),
        f"{value['images_per_s']:.0f}",
        f"{step['median']:.2f}",
        f"{step['p20']:.2f}-{step['p80']:.2f}",
        "-" if peak is None else f"{peak / 2**30:.2f}",
        str(value["launches"]),
        str(value["kernels"]),
        f"{value['kernel_ms']:.2f}",
        f"{value['warm_up_s']:.1f}",
    )


def _peers(items: Items) -> Iterator[str]:
    """Steps, samplers, and which commit each peer was."""
    steps = {name: value for name, value in items.items() if "step_ms" in value}
    samplers = {name: value for name, value in items.items() if "call" in value}
    yield from _steps(steps) if steps else ()
    yield from _sampler(samplers) if samplers else ()
    commits = [f"- {name}: commit {value['commit']}" for name, value in items.items() if "commit" in value]
    if commits:
        yield "\n".join(commits)


def _breakdown(ceilings: Items, items: Items) -> Iterator[str]:
    yield from _steps(items)
    for name, value in items.items():
        floors = category_floors(value, ceilings)
        lines = []
        for kind, entry in sorted(value["categories"].items(), key=lambda pair: -pair[1]["ms"]):
            floor = floors.get(kind)
            shown = ("-", "-") if floor is None else (f"{floor:.2f}", f"{entry['ms'] / floor:.2f}")
            lines.append((kind, f"{entry['ms']:.2f}", str(entry["kernels"]), *shown))
        gap = value["step_ms"]["median"] - value["busy_ms"]
        lines.append(("nothing (gaps between kernels)", f"{gap:.2f}", "-", "-", "-"))
        yield table((name, "ms", "kernels", "floor ms", "times the floor"), lines)
        if value["unknown"]:
            yield "Kernels of no known kind: " + ", ".join(f"`{kernel}`" for kernel in value["unknown"])


def category_floors(value: dict[str, Any], ceilings: Items) -> dict[str, float]:
    """Milliseconds that each category of a step takes at least, by the ceilings of the same report; none without them.

    From the cost models with the measured copy bandwidth and matrix product rate; of convolutions, ``convolution_floor``.
    """
    floors = {}
    if "copy" in ceilings and "matmul bf16" in ceilings:
        rates = ceilings["copy"]["bytes_per_s"], ceilings["matmul bf16"]["flops_per_s"]
        floors = {k: 1e3 * max(c["bytes"] / rates[0], c["flops"] / rates[1]) for k, c in value["costs"].items()}
    if conv := ceilings.get(f"conv {value['shapes']}"):
        floors["convolution"] = convolution_floor(conv, value["batch"])
    return floors


def _speedups(name: str, parts: dict[str, Items]) -> list[str]:
    """Ours over each baseline of the same part, as ratios of images per second."""
    speeds = {item: value["images_per_s"] for item, value in parts[name].items() if "step_ms" in value}
    ours = {item: speed for item, speed in speeds.items() if item.startswith("fastcm")}
    others = {item: speed for item, speed in speeds.items() if item not in ours}
    if not ours or not others:
        return []
    lines = [(item, *(f"{speed / other:.2f}" for other in others.values())) for item, speed in ours.items()]
    return [table(("times as fast as", *others), lines)]


def step_rates(result: dict[str, Any]) -> str:
    """Mode and images per second of every step that was measured, and how many times as fast as each baseline fastcm is."""
    blocks = []
    for name, part in result["parts"].items():
        good = {item: value for item, value in part["items"].items() if "step_ms" in value}
        if good and name.partition("-")[0] in ("ect", "edm"):
            rows = [
                (f"{item}, batch {value['batch']}", *mode_cells(value), f"{value['images_per_s']:.0f}")
                for item, value in good.items()
            ]
            head = (f"{name.partition('-')[0].upper()} step", *MODE_HEADER, "images/s")
            blocks += [table(head, rows), *_speedups(name, {name: good})]
    return "\n\n".join(blocks)


def _sampler(items: Items) -> Iterator[str]:
    header = ("sampler", *MODE_HEADER, "images/s", "call ms", "sum of kernels ms", "call over kernels", "kernels", "launches")
    lines = []
    for name, value in items.items():
        call_ms, kernel_ms = value["call"]["median_us"] / 1e3, value["kernel_ms"]
        times = (f"{call_ms:.3f}", f"{kernel_ms:.3f}", f"{call_ms / kernel_ms:.2f}")
        lines.append(
            (name, *mode_cells(value), f"{value['images_per_s']:.1f}", *times, str(value["kernels"]), str(value["launches"]))
        )
    yield table(header, lines)


def _training(items: Items) -> Iterator[str]:
    for name, value in items.items():
        phases = [(phase, " ".join(f"{loss:.4g}" for loss in losses)) for phase, losses in value["losses"].items()]
        yield table((f"{name}, phase", f"mean losses of {value['steps_per_loss']} steps each"), phases)
