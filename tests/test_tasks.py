"""The task graph against the layer itself, counted in plain Python from the routing."""

import numpy as np
import pytest
from hypothesis import given, settings
from layers import assert_sound, edges, layers, pairs_of, routing_from

from flashmoe.model import MoEModel
from flashmoe.routing import Routing
from flashmoe.tasks import ORDERS, TaskTable, Tiling, critical_path, ready_times, segment_owner
from flashmoe.trace import KINDS, TRACE_DTYPE

random_layers = settings(max_examples=40, deadline=None, derandomize=True)
SMALL = MoEModel(d_model=8, d_ff=4, num_experts=6, top_k=1, dtype="f32")


def tasks_of(table, kind):
    return table.tasks[table.tasks["kind"] == KINDS.index(kind)]


def pieces(total, size):
    """(first, length) of each piece of `size`."""
    return [(first, min(size, total - first)) for first in range(0, total, size)]


# ---- ids


@random_layers
@given(layer=layers())
def test_ids_are_dense_and_sorted_and_kinds_follow_each_other(layer):
    model, routing, tiling = layer
    table = TaskTable(model, routing, tiling)
    for pe in range(table.num_pes):
        mine = table.tasks[int(table.first[pe]) : int(table.first[pe + 1])]
        assert (mine["pe"] == pe).all()
        assert mine["task_id"].tolist() == list(range(len(mine)))
        assert table.row(pe, mine["task_id"].astype(np.int64)).tolist() == list(
            range(int(table.first[pe]), int(table.first[pe + 1]))
        )
        stages = ["gate", "route", "dispatch", "expert", "up", "down", "combine"]
        places = [stages.index(KINDS[kind]) for kind in mine["kind"]]
        assert places == sorted(places)
    assert int(table.first[-1]) == len(table)


@random_layers
@given(layer=layers())
def test_routing_from_outside_leaves_out_the_gate_tasks_and_nothing_else(layer):
    model, routing, tiling = layer
    inside, outside = TaskTable(model, routing, tiling), TaskTable(model, routing, tiling, gate=False)
    assert outside.tasks.tolist() == inside.tasks[inside.tasks["kind"] != KINDS.index("gate")].tolist()
    for pe in range(outside.num_pes):
        ids = outside.tasks["task_id"][outside.tasks["pe"] == pe].astype(np.int64)
        assert outside.row(pe, ids).tolist() == np.flatnonzero(outside.tasks["pe"] == pe).tolist()
    assert inside.plan_digests == outside.plan_digests


# ---- coverage


@random_layers
@given(layer=layers())
def test_every_product_is_computed_exactly_once(layer):
    model, routing, tiling = layer
    table = TaskTable(model, routing, tiling)
    experts_per_pe = model.experts_per_pe(routing.ep_size)
    counts = [len(pairs) for pairs in pairs_of(routing)]
    up = [np.zeros((count, model.d_ff), int) for count in counts]
    down = [np.zeros((count, model.d_model), int) for count in counts]
    # blocks are numbered over a PE's experts; each block is the next block_tokens of its expert's tokens
    first_block = [
        sum(-(-count // tiling.block_tokens) for count in counts[e - e % experts_per_pe : e])
        for e in range(model.num_experts)
    ]

    def block_of(task):
        first = (int(task["block"]) - first_block[task["expert"]]) * tiling.block_tokens
        assert first >= 0 and 1 <= task["num_tokens"] <= tiling.block_tokens
        return slice(first, first + int(task["num_tokens"]))

    def rows_of(tile, size):
        return slice(tile * size, (tile + 1) * size)

    for task in table.tasks:
        kind, expert = KINDS[task["kind"]], task["expert"]
        if expert >= 0:
            assert expert // experts_per_pe == task["pe"]
        if kind == "up":
            up[expert][block_of(task), rows_of(task["tile"], tiling.up_rows)] += 1
        elif kind == "expert":
            up[expert][block_of(task)] += 1
            down[expert][block_of(task)] += 1
        elif kind == "down" and tiling.down == "rows":
            assert task["num_tokens"] == counts[expert]
            down[expert][:, rows_of(task["tile"], tiling.down_rows)] += 1
        elif kind == "down":
            down[expert][block_of(task), rows_of(task["tile"], tiling.down_rows)] += 1
    for covered in [*up, *down]:
        assert (covered == 1).all()


@random_layers
@given(layer=layers())
def test_every_token_is_gated_routed_sent_and_combined_once(layer):
    model, routing, tiling = layer
    table = TaskTable(model, routing, tiling)
    experts_per_pe = model.experts_per_pe(routing.ep_size)
    for pe, idx in enumerate(routing.topk_idx):
        mine = table.tasks[table.tasks["pe"] == pe]
        count = len(idx)
        logits = np.zeros((count, model.num_experts), int)
        covered = {"route": np.zeros(count, int), "combine": np.zeros(count, int)}
        for task in mine:
            kind = KINDS[task["kind"]]
            size = tiling.combine_tokens if kind == "combine" else tiling.gate_tokens
            block = slice(int(task["block"]) * size, int(task["block"]) * size + int(task["num_tokens"]))
            if kind == "gate":
                first = int(task["tile"]) * tiling.gate_experts
                logits[block, first : first + tiling.gate_experts] += 1
            elif kind in covered:
                covered[kind][block] += 1
        assert (logits == 1).all() and (covered["route"] == 1).all()
        # a single row that is finished where it is made needs no combine
        groups = -(-experts_per_pe // (tiling.experts_per_pick or experts_per_pe))
        finished = tiling.down == "rows" and routing.ep_size == groups == 1
        assert (covered["combine"] == (0 if finished else 1)).all()

        blocks = pieces(count, tiling.dispatch_tokens) or [(0, 0)]  # having no tokens is told as well
        sent = {}
        for task in mine[mine["kind"] == KINDS.index("dispatch")]:
            sent[int(task["peer"]), int(task["block"])] = int(task["num_tokens"])
        wanted = {
            (peer, block): sum(
                peer in {e // experts_per_pe for e in idx[t] if e >= 0} for t in range(first, first + length)
            )
            for peer in range(routing.ep_size)
            if peer != pe
            for block, (first, length) in enumerate(blocks)
        }
        assert sent == wanted


@random_layers
@given(layer=layers())
def test_chains_partition_the_down_tasks_by_rows_and_group(layer):
    model, routing, tiling = layer
    table = TaskTable(model, routing, tiling)
    group_size = tiling.experts_per_pick or model.num_experts
    experts_per_pe = model.experts_per_pe(routing.ep_size)
    row = 0
    while row < len(table):
        length = int(table.tasks["chain"][row])
        chain = table.tasks[row : row + length]
        assert length >= 1 and (chain["chain"][1:] == 0).all()
        if tiling.down == "rows" and KINDS[chain["kind"][0]] == "down":
            assert len(set(chain["tile"].tolist())) == 1 and (np.diff(chain["expert"]) > 0).all()
            group = {e % experts_per_pe // group_size for e in chain["expert"].tolist()}
            assert len(group) == 1
            # and nobody of the group is left out
            active = [e for e, pairs in enumerate(pairs_of(routing)) if pairs]
            assert chain["expert"].tolist() == [
                e
                for e in active
                if e // experts_per_pe == chain["pe"][0] and {e % experts_per_pe // group_size} == group
            ]
        else:
            assert length == 1
        row += length
    assert row == len(table)


# ---- edges


@random_layers
@given(layer=layers())
def test_every_event_is_produced_as_often_as_wanted_and_awaited_on_its_own_pe(layer):
    model, routing, tiling = layer
    for gate in (True, False):
        table = TaskTable(model, routing, tiling, gate=gate)
        made = np.bincount(table.signal_event, minlength=len(table.event_target))
        assert made.tolist() == table.event_target.tolist()
        waiter = segment_owner(table.wait_ptr)
        assert (table.event_pe[table.wait_event] == table.tasks["pe"][waiter]).all()
        maker = segment_owner(table.signal_ptr)
        away = table.event_pe[table.signal_event] != table.tasks["pe"][maker]
        assert (table.signal_bytes[~away] == 0).all()
        for row in range(len(table)):
            waits = edges(table.wait_ptr, table.wait_event, row)
            assert len(waits) == len(set(waits))


@random_layers
@given(layer=layers())
def test_a_combine_waits_for_the_results_of_its_own_tokens_only(layer):
    model, routing, tiling = layer
    table = TaskTable(model, routing, tiling)
    makers = {}  # event -> experts whose tasks complete it
    expert_of = table.tasks["expert"][segment_owner(table.signal_ptr)]
    for event, expert in zip(table.signal_event.tolist(), expert_of.tolist(), strict=True):
        makers.setdefault(event, set()).add(expert)
    for row in np.flatnonzero(table.tasks["kind"] == KINDS.index("combine")):
        task = table.tasks[row]
        first = int(task["block"]) * tiling.combine_tokens
        idx = routing.topk_idx[task["pe"]][first : first + int(task["num_tokens"])]
        wanted = {int(expert) for expert in idx.ravel() if expert >= 0}
        results = edges(table.wait_ptr, table.wait_event, int(row))
        results.remove(int(table.planned_event[task["pe"]]))
        found = set().union(*(makers[event] for event in results)) if results else set()
        if tiling.down == "rows":  # the chain's last expert tells of the whole group
            assert len(results) <= len(wanted) and bool(found) == bool(wanted)
        else:
            assert found == wanted


@random_layers
@given(layer=layers())
def test_the_graph_has_an_order(layer):
    model, routing, tiling = layer
    table = TaskTable(model, routing, tiling)
    heads = np.flatnonzero(table.tasks["chain"] > 0)
    stage = np.array([{"gate": 0, "route": 1, "dispatch": 2, "down": 4, "combine": 5}.get(k, 3) for k in KINDS])
    assert_sound(table, heads[np.argsort(stage[table.tasks["kind"][heads]], kind="stable")].tolist())


# ---- sums


@random_layers
@given(layer=layers())
def test_flops_and_weight_bytes_are_the_layers(layer):
    model, routing, tiling = layer
    table = TaskTable(model, routing, tiling)
    num_pairs = [len(pairs) for pairs in pairs_of(routing)]
    num_tokens = sum(routing.num_tokens)
    matrix = model.d_model * model.d_ff  # a third of an expert
    flops = {kind: int(tasks_of(table, kind)["flops"].sum()) for kind in KINDS}
    assert flops["gate"] == 2 * num_tokens * model.num_experts * model.d_model
    assert flops["up"] + flops["down"] + flops["expert"] == 6 * sum(num_pairs) * matrix
    if tiling.down == "tile":
        assert flops["combine"] == 2 * num_tokens * model.top_k * model.d_model
    assert flops["route"] == flops["dispatch"] == 0

    weight_bytes = {kind: int(tasks_of(table, kind)["weight_bytes"].sum()) for kind in KINDS}
    expert_blocks = sum(-(-count // tiling.block_tokens) for count in num_pairs)
    active = sum(count > 0 for count in num_pairs)
    matrix_bytes = matrix * model.element_bytes
    gate_blocks = sum(len(pieces(count, tiling.gate_tokens)) for count in routing.num_tokens)
    assert weight_bytes["gate"] == gate_blocks * model.gate_bytes
    if tiling.granularity == "token":
        assert weight_bytes["expert"] == sum(num_pairs) * model.expert_bytes
        assert weight_bytes["up"] == weight_bytes["down"] == 0
    else:
        assert weight_bytes["up"] == expert_blocks * 2 * matrix_bytes
        assert weight_bytes["down"] == matrix_bytes * (active if tiling.down == "rows" else expert_blocks)
    assert weight_bytes["route"] == weight_bytes["dispatch"] == weight_bytes["combine"] == 0


@random_layers
@given(layer=layers())
def test_link_bytes_are_rows_times_destinations_and_results(layer):
    model, routing, tiling = layer
    table = TaskTable(model, routing, tiling)
    experts_per_pe = model.experts_per_pe(routing.ep_size)
    row_bytes = model.d_model * model.element_bytes
    sent = results = 0
    for pe, idx in enumerate(routing.topk_idx):
        for experts in idx.tolist():
            away = [e for e in experts if e >= 0 and e // experts_per_pe != pe]
            sent += len({e // experts_per_pe for e in away})  # once to each PE, however many experts it has
            if tiling.down == "rows":
                group = tiling.experts_per_pick or experts_per_pe
                results += len({(e // experts_per_pe, e % experts_per_pe // group) for e in away})
            else:
                results += len(away)
    # a row travels with its experts (int32) and weights (float32)
    assert tasks_of(table, "dispatch")["link_bytes"].sum() == sent * (row_bytes + model.top_k * 8)
    makers = tasks_of(table, "down")["link_bytes"].sum() + tasks_of(table, "expert")["link_bytes"].sum()
    assert makers == results * row_bytes
    assert table.tasks["link_bytes"].sum() == table.signal_bytes.sum()
    assert tasks_of(table, "dispatch")["num_tokens"].sum() == sent


# ---- orders


@random_layers
@given(layer=layers())
def test_every_order_holds_every_pick_and_puts_none_before_its_inputs(layer):
    model, routing, tiling = layer
    for gate in (True, False):
        table = TaskTable(model, routing, tiling, gate=gate)
        for name in ORDERS:
            ids = table.order(name)
            for pe in range(table.num_pes):
                mine = table.tasks[table.tasks["pe"] == pe]
                assert sorted(ids[pe].tolist()) == mine["task_id"][mine["chain"] > 0].tolist()
            # PEs side by side, each in its order, as far as they get
            heads = [iter(table.row(pe, i.astype(np.int64)).tolist()) for pe, i in enumerate(ids)]
            assert_sound(table, interleave(table, heads))


@random_layers
@given(layer=layers())
def test_a_worker_decodes_its_ranks_as_the_graph_does(layer):
    """In whatever steps it takes them: alone, or with others that take the ranks between."""
    model, routing, tiling = layer
    for gate in (True, False):
        table = TaskTable(model, routing, tiling, gate=gate)
        for order in range(len(ORDERS)):
            for pe in range(table.num_pes):
                for stride in (1, 3, 40):
                    assert table._native.wrongly_decoded(pe, order, stride).tolist() == []


@pytest.mark.parametrize(
    ("down", "combine_tokens", "num_workers", "rank"),
    [
        # 1 gate, 1 route; 2 experts x 3 up; 2 experts x 2 down; 2 tokens' combine: the last 2
        ("tile", 1, 5, 12),
        ("tile", 1, 1, 13),
        ("tile", 2, 5, 12),  # both tokens in one combine
        # by rows: 2 chains, of both experts, and no combine
        ("rows", 1, 5, 8),
        ("rows", 1, 1, 9),
    ],
)
def test_whoever_has_one_of_the_last_picks_need_not_ask_for_more(down, combine_tokens, num_workers, rank):
    model = MoEModel(d_model=8, d_ff=6, num_experts=2, top_k=2)
    rows = {"up_rows": 2, "down_rows": 4, "block_tokens": 2, "gate_tokens": 2, "gate_experts": 2}
    tiling = Tiling(down=down, combine_tokens=combine_tokens, **rows)
    table = TaskTable(model, Routing.one(model, 2, 1), tiling)
    assert table._native.first_of_last(0, ORDERS.index("phase"), num_workers) == rank


def interleave(table, heads):
    """Play each PE's order in turn as far as its inputs allow; a PE that is stuck waits for the others."""
    done = np.zeros(len(table.event_target), np.int64)
    current, played = [next(head, None) for head in heads], []
    moved = True
    while moved:
        moved = False
        for pe in range(len(heads)):
            while current[pe] is not None:
                chain = range(current[pe], current[pe] + int(table.tasks["chain"][current[pe]]))
                waits = [event for row in chain for event in edges(table.wait_ptr, table.wait_event, row)]
                if any(done[event] < table.event_target[event] for event in waits):
                    break
                for row in chain:
                    for event in edges(table.signal_ptr, table.signal_event, row):
                        done[event] += 1
                played.append(current[pe])
                current[pe] = next(heads[pe], None)
                moved = True
    return played


# PE 0 owns experts 0, 1, 2. Its own tokens go to 2 1 2 0 2, those of PE 1 to 1 0 1 1:
#   expert 0: 1 own of 2 tokens; expert 1: 1 of 4; expert 2: 3 of 3.
MET = routing_from([[[2], [1], [2], [0], [2]], [[1], [0], [1], [1]]], 6)
ONE_TILE = Tiling(up_rows=4, down_rows=8)


@pytest.mark.parametrize(
    ("order", "experts"),
    [
        ("phase", [0, 1, 2]),
        ("expert", [0, 1, 2]),
        ("local_first", [2, 0, 1]),  # 3/3, 1/2, 1/4
        ("remote_first", [1, 0, 2]),
        ("lpt", [1, 2, 0]),  # 4, 3, 2 tokens
        ("arrival", [2, 1, 0]),
    ],
)
def test_orders_by_hand(order, experts):
    table = TaskTable(SMALL, MET, ONE_TILE, gate=False)
    ids = table.order(order)[0].astype(np.int64)
    picks = [(KINDS[t["kind"]], int(t["expert"])) for t in table.tasks[table.row(0, ids)]]
    up, down = [("up", e) for e in experts], [("down", e) for e in experts]
    by_expert = [pick for pair in zip(up, down, strict=True) for pick in pair]
    assert [pick for pick in picks if pick[1] >= 0] == (by_expert if order in ("expert", "lpt") else up + down)
    assert [kind for kind, _ in picks[:6]] == ["route"] + ["dispatch"] * 5  # one block of 5 tokens
    assert [kind for kind, _ in picks[-5:]] == ["combine"] * 5


def test_arrival_begins_with_own_tokens_and_goes_round():
    # PE 1 owns experts 4..7; tokens of PEs 1, 2, 3, 0 bring experts 6, 4, 5, 7.
    model = MoEModel(d_model=8, d_ff=4, num_experts=16, top_k=2, dtype="f32")
    routing = routing_from([[[7, 4]], [[0, 6]], [[6, 4]], [[6, 5]]], 16)
    table = TaskTable(model, routing, ONE_TILE, gate=False)
    tasks = table.tasks[table.row(1, table.order("arrival")[1].astype(np.int64))]
    assert tasks["expert"][tasks["kind"] == KINDS.index("up")].tolist() == [6, 4, 5, 7]


def test_equal_ranks_go_by_expert_and_blocks_by_number():
    table = TaskTable(SMALL, MET, Tiling(up_rows=2, down_rows=8, block_tokens=2), gate=False)
    tasks = table.tasks[table.row(0, table.order("lpt")[0].astype(np.int64))]
    ups = tasks[tasks["kind"] == KINDS.index("up")]
    # 4 tokens: 2 blocks; 3: 2; 2: 1; two tiles each
    wanted = [(1, 0), (1, 1), (1, 0), (1, 1), (2, 0), (2, 1), (2, 0), (2, 1), (0, 0), (0, 1)]
    assert list(zip(ups["expert"].tolist(), ups["tile"].tolist(), strict=True)) == wanted
    assert ups["num_tokens"].tolist() == [2, 2, 2, 2, 2, 2, 1, 1, 2, 2]
    even = TaskTable(SMALL, routing_from([[[2], [1], [0]], [[3]]], 6), ONE_TILE, gate=False)
    tasks = even.tasks[even.row(0, even.order("lpt")[0].astype(np.int64))]
    assert tasks["expert"][tasks["kind"] == KINDS.index("up")].tolist() == [0, 1, 2]


def test_each_pe_sends_to_its_right_hand_neighbour_first():
    model = MoEModel(d_model=8, d_ff=4, num_experts=4, top_k=1, dtype="f32")
    table = TaskTable(model, routing_from([[[0]], [[0]], [[0]], [[0]]], 4))
    peers = [table.tasks["peer"][(table.tasks["pe"] == pe) & (table.tasks["peer"] >= 0)].tolist() for pe in range(4)]
    assert peers == [[1, 2, 3], [2, 3, 0], [3, 0, 1], [0, 1, 2]]


# ---- one layer by hand


def test_a_layer_written_out():
    """One PE, two experts, one token that uses both."""
    model = MoEModel(d_model=8, d_ff=4, num_experts=2, top_k=2, dtype="f32")
    table = TaskTable(model, routing_from([[[1, 0]]], 2), Tiling(gate_experts=1, up_rows=3, down_rows=8))
    described = [table.describe(row) for row in range(len(table))]
    assert described == [
        "task 0 of PE 0: gate, tile 0, block 0",
        "task 1 of PE 0: gate, tile 1, block 0",
        "task 2 of PE 0: route, block 0",
        "task 3 of PE 0: up, expert 0, tile 0, block 0",
        "task 4 of PE 0: up, expert 0, tile 1, block 0",
        "task 5 of PE 0: up, expert 1, tile 0, block 1",
        "task 6 of PE 0: up, expert 1, tile 1, block 1",
        "task 7 of PE 0: down, expert 0, tile 0, block 0",
        "task 8 of PE 0: down, expert 1, tile 0, block 1",
        "task 9 of PE 0: combine, block 0",
    ]
    waits = [
        [table.describe_event(event) for event in edges(table.wait_ptr, table.wait_event, row)]
        for row in range(len(table))
    ]
    planned = ["planned[0] on PE 0"]
    assert waits == [
        [],
        [],
        ["gated[0] on PE 0"],
        *[planned] * 4,
        ["upped[0] on PE 0"],
        ["upped[1] on PE 0"],
        [*planned, "result[1] on PE 0", "result[0] on PE 0"],
    ]
    # up: 3 of 4 row pairs, then 1; down: 8 rows of 4
    assert table.tasks["weight_bytes"].tolist() == [32, 32, 0, 192, 64, 192, 64, 128, 128, 0]
    assert table.tasks["flops"].tolist() == [16, 16, 0, 96, 32, 96, 32, 64, 64, 32]


def test_local_tokens_counts_own_tokens_of_expert_tasks():
    table = TaskTable(SMALL, MET, ONE_TILE)
    for row in np.flatnonzero((table.tasks["pe"] == 0) & (table.tasks["expert"] >= 0)):
        assert table.local_tokens[row] == {0: 1, 1: 1, 2: 3}[int(table.tasks["expert"][row])]
    assert (table.local_tokens[table.tasks["expert"] < 0] == 0).all()


def test_plan_digests_tell_tokens_per_expert():
    def digests(rows):
        return TaskTable(SMALL, routing_from(rows, 6)).plan_digests

    same = digests([[[0], [1]], [[4]]])
    assert digests([[[1], [0]], [[4]]]) == same
    assert digests([[[0], [0]], [[4]]])[0] != same[0]
    assert digests([[[0], [0]], [[4]]])[1] == same[1]


# ---- reading a run


def records_of(table, end_ps, workers):
    records = np.zeros(len(table), TRACE_DTYPE)
    for name in ("pe", "task_id", "kind"):
        records[name] = table.tasks[name]
    records["end_ps"], records["worker"] = end_ps, workers
    records["ready_ps"] = ready_times(table, np.array(end_ps, np.int64))
    return records


def test_ready_times_and_critical_path_by_hand():
    model = MoEModel(d_model=8, d_ff=4, num_experts=2, top_k=2, dtype="f32")
    table = TaskTable(model, routing_from([[[0, 1]]], 2), Tiling(up_rows=4, down_rows=8), gate=False)
    assert [KINDS[kind] for kind in table.tasks["kind"]] == ["route", "up", "up", "down", "down", "combine"]
    # worker 0: route, up 0, down 0; worker 1: up 1, down 1, combine
    records = records_of(table, [10, 30, 20, 70, 40, 80], [0, 0, 1, 0, 1, 1])
    records["start_ps"] = [0, 10, 10, 30, 20, 70]
    assert records["ready_ps"].tolist() == [0, 10, 10, 30, 20, 70]
    # the combine waited for down 0, that for up 0, that for route
    assert critical_path(table, records).tolist() == [0, 1, 3, 5]
    records = records[[5, 4, 3, 2, 1, 0]]  # the place in the records counts, not in the table
    assert critical_path(table, records).tolist() == [5, 4, 2, 0]


def test_critical_path_follows_a_busy_worker():
    model = MoEModel(d_model=8, d_ff=4, num_experts=2, top_k=2, dtype="f32")
    table = TaskTable(model, routing_from([[[0, 1]]], 2), Tiling(up_rows=4, down_rows=8), gate=False)
    records = records_of(table, [10, 20, 60, 30, 70, 80], [0, 0, 0, 1, 1, 1])
    records["start_ps"] = [0, 10, 20, 20, 60, 70]
    # up 1 was ready at 10 and had to wait for up 0 on its worker
    assert critical_path(table, records).tolist() == [0, 1, 2, 4, 5]
    assert critical_path(table, records[:0]).tolist() == []


def test_critical_path_goes_on_in_the_layer_before():
    model = MoEModel(d_model=8, d_ff=4, num_experts=2, top_k=2, dtype="f32")
    tables = [
        TaskTable(model, routing_from([[[0, 1]]], 2), tiling, gate=False)
        for tiling in (Tiling(up_rows=4, down_rows=8), Tiling(up_rows=4, down_rows=4))
    ]
    # route, up, up, down, down, combine; in layer 1 each expert has two down tasks
    first = records_of(tables[0], [10, 30, 20, 70, 40, 80], [0, 0, 1, 0, 1, 1])
    first["start_ps"] = [0, 10, 10, 30, 20, 70]
    second = records_of(tables[1], [90, 100, 110, 120, 130, 140, 150, 160], [0] * 8)
    second["layer"], second["start_ps"] = 1, second["end_ps"] - 10
    second["ready_ps"][0] = 80
    records = np.concatenate([first, second])
    # layer 0: the combine waited for down 0, that for up 0, that for route; then worker 0 has all of layer 1
    assert critical_path(tables, records).tolist() == [0, 1, 3, 5, *range(6, 14)]
    # as in a launch of its own: nothing tells when the input was there, and yet the layer before had to end
    records["ready_ps"][6] = 0
    assert critical_path(tables, records).tolist() == [0, 1, 3, 5, *range(6, 14)]


# ---- errors


@pytest.mark.parametrize(
    ("sizes", "named"),
    [
        ({"granularity": "row"}, "granularity='row' (accepted: tile, token)"),
        ({"down": "columns"}, "down='columns' (accepted: tile, rows)"),
        ({"granularity": "token", "down": "rows"}, "down='rows' with granularity='token'"),
        ({"up_rows": -1}, "up_rows=-1"),
        ({"up_rows": 1.5}, "up_rows=1.5"),
        ({"gate_tokens": 4, "dispatch_tokens": 3}, "dispatch_tokens=3 does not divide gate_tokens=4"),
        ({"granularity": "token", "block_tokens": 2}, "block_tokens=2"),
    ],
)
def test_bad_tilings_name_what_is_wrong(sizes, named):
    with pytest.raises(ValueError, match=r".") as error:
        Tiling(**sizes)
    assert named in str(error.value)


def test_tables_refuse_what_does_not_fit():
    with pytest.raises(ValueError, match="top_k=2"):
        TaskTable(SMALL, Routing.uniform(MoEModel(d_model=8, d_ff=4, num_experts=6, top_k=2), 1, 1))
    with pytest.raises(ValueError, match=r"order='best' \(accepted: phase, expert"):
        TaskTable(SMALL, MET).order("best")


def test_tables_of_nothing():
    model = MoEModel(d_model=8, d_ff=4, num_experts=2, top_k=1)
    alone = TaskTable(model, Routing.uniform(model, 0, 1))
    assert len(alone) == 0 and [len(ids) for ids in alone.order("phase")] == [0]
    both = TaskTable(model, Routing.uniform(model, 0, 2))
    assert [KINDS[kind] for kind in both.tasks["kind"]] == ["dispatch", "dispatch"]  # "I have no tokens"
    assert both.event_target[both.planned_event].tolist() == [1, 1]
