"""A benchmark's result for people: tables of words, for a terminal of 80 columns or a file."""

from __future__ import annotations

from flashmoe.bench.result import OURS, Measurement, Result, whole

Table = tuple[list[str], list[list[str]]]  # names of columns, rows of cells


def layer_table(result: Result, routing: str) -> Table:
    """flashmoe beside the read ceiling, a row for each number of tokens."""
    columns = ["tokens", "experts", "MB", "read\nµs", "TB/s"]
    has_gate = whole(routing) == "gate"
    columns += ["ours\nµs", "spread\nµs", "share"] if has_gate else []
    columns += ["given\nµs", *([] if has_gate else ["spread\nµs"]), "share", "alone\nµs"]
    rows = []
    for tokens in result.tokens(routing):
        ceiling = result.ceiling(routing, tokens)
        rate = ceiling.weight_bytes / ceiling.median_us * 1e-6
        cells = [str(tokens), f"{ceiling.distinct_experts:.1f}", f"{ceiling.weight_bytes * 1e-6:,.0f}"]
        cells += [_time(ceiling), f"{rate:.2f}"]
        gate = result.find(routing, tokens, OURS, "gate", "tuned")
        given = result.find(routing, tokens, OURS, "given", "tuned")
        cells += [_time(gate), _spread(gate), _share(result, gate)] if has_gate else []
        cells += [_time(given), *([] if has_gate else [_spread(given)]), _share(result, given)]
        cells += [_time(result.find(routing, tokens, OURS, "alone", "tuned"))]
        rows.append(cells)
    return columns, rows


def peer_table(result: Result, routing: str) -> Table:
    """Everybody's time, and how many times that of flashmoe it is."""
    how = whole(routing)
    columns = ["tokens", "ours\nµs"]
    for peer in result.peers():
        columns += [f"{peer}\nµs", "times\nours"]
    rows = []
    for tokens in result.tokens(routing):
        ours = result.find(routing, tokens, OURS, how, "tuned")
        cells = [str(tokens), _time(ours)]
        for peer in result.peers():
            theirs = result.find(routing, tokens, peer, how)
            cells += [_time(theirs), _ratio(theirs, ours)]
        rows.append(cells)
    return columns, rows


def policy_table(result: Result, routing: str) -> Table:
    """What each policy costs [µs], a row for each of them and the kernel that it ran on (the rows of `bench.csv` say
    which instance of it)."""
    how = whole(routing)
    all_tokens = result.tokens(routing)
    measured = [row for row in result.measurements if (row.routing, row.who, row.how) == (routing, OURS, how)]
    if len({row.variant for row in measured}) < 2:
        return [], []
    rows = []
    for variant, kernel in dict.fromkeys((row.variant, _family(row)) for row in measured):
        mine = {row.tokens: row for row in measured if (row.variant, _family(row)) == (variant, kernel)}
        rows.append([variant, kernel, *(_time(mine.get(tokens)) for tokens in all_tokens)])
    return ["policy", "kernel", *(f"{tokens} tokens" for tokens in all_tokens)], rows


def as_markdown(table: Table) -> str:
    columns, rows = table
    lines = [[column.replace("\n", " ") for column in columns], ["---"] * len(columns), *rows]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


def describe(result: Result) -> str:
    """How it was measured, in a few sentences."""
    header = result.header
    model, clocks = header["model"], header["clocks"]
    driver = f", driver {clocks['driver_version']}" if "driver_version" in clocks else ""
    return (
        f"{header['device']}{driver}, CUDA {header['cuda']}, torch {header['torch']}, {header['date']}, "
        f"commit {header['commit'] or 'unknown'}. {model['name']}: d_model {model['d_model']}, d_ff {model['d_ff']}, "
        f"{model['num_experts']} experts, top {model['top_k']}, bf16. Microseconds a layer: a CUDA graph of "
        f"{header['num_layers']} layers back to back, tokens and routing of their own each, {header['weight_sets']} "
        f"weight sets ({header['weight_sets_bytes'] * 1e-9:.1f} GB) in turn, median of {header['repeats']} replays."
    )


LEGEND = (
    "read: the ceiling, the fastest of several kernels that only read as many bytes as the chosen experts' weights "
    "have, timed the same way. ours: flashmoe, the router inside. spread: from the 10th to the 90th percentile. share: "
    "the ceiling's time over the layer's. given: flashmoe, the routing from outside. alone: each layer in a graph "
    "of its own, its weights in no cache; that includes the start of a graph (an empty one takes {empty:.1f} µs), and "
    "nothing overlaps with a layer before or after. Every output was compared with float32 on the same routing, in "
    "buffers that held NaN, before and after the timed replays."
)


def notes(result: Result) -> list[str]:
    """What the tables do not show: their words, the errors, the bits, what is missing."""
    computed = [row for row in result.measurements if row.error is not None and row.right]
    lines = [LEGEND.format(empty=result.header["empty_graph_us"])]
    if computed:
        worst = max(row.error or 0.0 for row in computed)
        lines.append(f"Relative error of what is right: at most {worst:.1e}.")
    moving = dict.fromkeys(_name(row) for row in computed if not row.same_bits)
    lines.append(
        f"Not the same bits in every replay: {', '.join(moving)}." if moving else "All replays gave the same bits."
    )
    lines += _gaps(result)
    lines += [
        f"Wrong: {_name(row)}, {row.tokens} tokens, routing {row.routing}: {row.error:.2g}." for row in result.wrong()
    ]
    return lines


def readme(result: Result) -> str:
    """A page for a folder of results."""
    parts = [f"# One layer of {result.header['model']['name']} on {result.header['device']}\n"]
    parts += [f"`{result.header['command']}`\n", f"{describe(result)}\n", "![share of the read ceiling](bench.png)\n"]
    for routing in result.routings():
        parts.append(f"## Routing: {routing}\n")
        tables = layer_table(result, routing), peer_table(result, routing), policy_table(result, routing)
        parts += [as_markdown(table) for table in tables if len(table[0]) > 2]
    parts.append("\n".join(f"- {line}" for line in notes(result)) + "\n")
    return "\n".join(parts)


def _family(row: Measurement) -> str:
    """pipeline of "pipeline, lists of 16"."""
    return row.kernel.partition(",")[0]


def _gaps(result: Result) -> list[str]:
    """A line for each reason, with everybody it holds for."""
    tokens_by_who: dict[tuple[str, str], list[int]] = {}  # (reason, who)
    for gap in result.missing:
        tokens = tokens_by_who.setdefault((gap.reason, gap.who), [])
        if gap.tokens is not None and gap.tokens not in tokens:
            tokens.append(gap.tokens)
    who_by_rest: dict[tuple[str, str], list[str]] = {}  # (reason, tokens in words)
    for (reason, who), tokens in tokens_by_who.items():
        where = f" at {', '.join(map(str, tokens))} tokens" if tokens else ""
        who_by_rest.setdefault((reason, where), []).append(who)
    return [f"Not measured: {', '.join(who)}{where} ({reason})." for (reason, where), who in who_by_rest.items()]


def _time(row: Measurement | None) -> str:
    if row is None:
        return "-"
    if not row.right:
        return "wrong"
    return f"{row.median_us:.1f}" if row.median_us < 1000 else f"{row.median_us:,.0f}"


def _spread(row: Measurement | None) -> str:
    return "-" if row is None else f"{row.p90_us - row.p10_us:.1f}"


def _share(result: Result, row: Measurement | None) -> str:
    return "-" if row is None or not row.right else f"{result.share(row):.3f}"


def _ratio(row: Measurement | None, base: Measurement | None) -> str:
    if row is None or base is None or not (row.right and base.right):
        return "-"
    return f"{row.median_us / base.median_us:.2f}"


def _name(row: Measurement) -> str:
    return " ".join(word for word in (row.who, row.variant, row.how) if word)
