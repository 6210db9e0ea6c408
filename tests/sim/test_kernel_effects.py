"""How a GPU kernel begins and ends tasks, on both engines: every time below is worked out by hand."""

import math

import numpy as np
import pytest
from sim.tables import HandPolicy, HandTable, plain_machine, run_engine

from flashmoe.sim import ENGINES, jitter
from flashmoe.trace import FROM_CACHE, memory_bytes


@pytest.fixture(params=list(ENGINES))
def run(request):
    """Runs a table on an engine: run(table, machine, workers, lists, queue=..., look_ahead=...)."""
    return lambda *arguments, **options: run_engine(request.param, *arguments, **options)


def waiting(kind="up"):
    """A `down` of 1 ns that waits for a task of 5 ns."""
    table = HandTable()
    ready = table.event("upped")
    table.task(kind, flops=5, signals=(ready,))
    table.task("down", flops=1, waits=(ready,))
    return table


def planned(tokens):
    """Two `up` of 1 ns that wait for the plan, which is there when a `route` of 4 ns has signalled it."""
    table = HandTable()
    table.task("route", flops=4, tokens=tokens, signals=(table.plan(),))
    table.task("up", flops=1, waits=(table.plan(),))
    table.task("up", flops=1, waits=(table.plan(),))
    return table


def test_a_release_follows_a_task_that_signals_and_then_the_signal_travels(run):
    records = run(waiting(), plain_machine(release_ps=2_000, signal_ps=500), workers=2)
    assert records["start_ps"].tolist() == [0, 7_500]
    assert records["end_ps"].tolist() == [5_000, 8_500]  # the down signals nobody


def test_a_worker_releases_one_task_after_the_other_beside_the_next(run):
    table = HandTable()
    ready = [table.event("upped") for _ in range(2)]
    for event in ready:
        table.task("up", flops=1, signals=(event,))
    for event in ready:
        table.task("down", flops=1, waits=(event,))
    machine = plain_machine(release_ps=3_000, signal_ps=500)
    records = run(table, machine, workers=3, queue="replay", lists=[[[0, 1], [2], [3]]])
    assert records["start_ps"].tolist() == [0, 1_000, 4_500, 7_500]  # releases: 1 to 4, 4 to 7 ns


def test_with_push_a_worker_releases_before_it_goes_on(run):
    table = HandTable()
    ready = table.event("upped")
    table.task("route", signals=(table.plan(),))
    table.task("up", flops=5, waits=(table.plan(),), signals=(ready,))
    table.task("down", flops=1, waits=(ready,))
    records = run(table, plain_machine(release_ps=2_000), queue="push")
    assert records["end_ps"].tolist() == [0, 7_000, 8_000]


def test_logits_and_routing_need_no_release(run):
    records = run(waiting("gate"), plain_machine(release_ps=2_000, signal_ps=500), workers=2)
    assert records["end_ps"].tolist() == [5_000, 6_500]


def test_a_release_takes_longer_while_memory_is_busy(run):
    table = HandTable()
    table.task("up", weights=1000)
    ready = table.event("upped")
    table.task("up", flops=5, signals=(ready,))
    table.task("down", waits=(ready,))
    # one stream of 10 GB/s of 100 runs: 1 + 4 * 10 % of 1 ns
    for beside in (False, True):
        machine = plain_machine(release_ps=1_000, release_load_factor=5.0, finish_beside=beside)
        assert run(table, machine, workers=3)["start_ps"][2] == 6_400


def test_without_warps_for_it_the_end_of_a_task_holds_up_the_next(run):
    table = HandTable()
    for _ in range(3):
        table.task("up", flops=5)
    records = run(table, plain_machine(up_overhead_ps=3_000))
    assert records["start_ps"].tolist() == [0, 8_000, 16_000]


@pytest.mark.parametrize(
    ("overhead_ps", "ends_ps"),
    [
        (3_000, [8_000, 13_000, 18_000]),
        (7_000, [12_000, 19_000, 26_000]),  # one at a time: each begins when the one before has ended
    ],
)
def test_tasks_end_beside_the_next_one_at_a_time(run, overhead_ps, ends_ps):
    table = HandTable()
    for _ in range(3):
        table.task("up", flops=5)
    records = run(table, plain_machine(up_overhead_ps=overhead_ps, finish_beside=True))
    assert records["start_ps"].tolist() == [0, 5_000, 10_000]
    assert records["done_ps"].tolist() == [5_000, 10_000, 15_000]
    assert records["end_ps"].tolist() == ends_ps


def test_a_task_that_ends_beside_another_signals_at_its_end(run):
    table = waiting()
    table.task("up", flops=20)
    machine = plain_machine(up_overhead_ps=3_000, release_ps=2_000, signal_ps=500, finish_beside=True)
    records = run(table, machine, workers=2, queue="replay", lists=[[[0, 2], [1]]])
    assert records["start_ps"].tolist() == [0, 10_500, 5_000]


def test_with_push_a_worker_ends_its_task_before_it_takes_another(run):
    table = HandTable()
    table.task("route", signals=(table.plan(),))
    for _ in range(2):
        table.task("up", flops=5, waits=(table.plan(),))
    records = run(table, plain_machine(up_overhead_ps=3_000, finish_beside=True), queue="push")
    assert records["start_ps"].tolist() == [0, 0, 8_000]


@pytest.mark.parametrize("engine", list(ENGINES))
def test_a_launch_is_over_when_the_last_task_has_ended(engine):
    first, second = HandTable(), HandTable()
    first.task("up", flops=5)
    second.task("gate", flops=1)
    machine = plain_machine(up_overhead_ps=3_000, finish_beside=True)
    records = ENGINES[engine]([first, second], machine, HandPolicy(), 1, gap_ps=1_000)
    assert records["start_ps"].tolist() == [0, 9_000]


@pytest.mark.parametrize("engine", list(ENGINES))
def test_a_worker_that_is_free_as_its_release_is_over_tells_before_it_goes_on_to_the_next_layer(engine):
    first, second = HandTable(), HandTable()
    ready = first.event("upped")
    first.task("route", signals=(first.plan(),))
    first.task("up", flops=5, signals=(ready,))
    first.task("down", flops=1, waits=(ready,))
    second.task("gate", flops=1)
    # up: 5 ns, then 1 beside and a release of 1; its worker's books take 2, too, as the other's after down
    machine = plain_machine(finish_beside=True, up_overhead_ps=1_000, release_ps=1_000, gap_ps=2_000)
    records = ENGINES[engine]([first, second], machine, HandPolicy(), 2)
    assert records["start_ps"].tolist() == [0, 0, 7_000, 10_000]


def test_every_worker_makes_its_lists_the_one_that_routed_too(run):
    machine = plain_machine(signal_ps=500, plan_ps=1_000, plan_token_ps=100)
    for workers in (1, 3):
        records = run(planned(tokens=3), machine, workers=workers)
        assert records["ready_ps"].tolist() == [0, 5_800, 5_800]  # 4 + 0.5 + 1 + 3 * 0.1 ns


def test_experts_are_sorted_where_the_order_says_so(run):
    table = HandTable(num_pes=2)
    for pe, experts in enumerate([(7, 7, 3), ()]):
        table.task("route", pe=pe, flops=4, signals=(table.plan(pe),))
        for expert in experts:
            table.task("up", pe=pe, flops=1, expert=expert, waits=(table.plan(pe),))
        table.task("combine", pe=pe, flops=1, waits=(table.plan(pe),))
    machine = plain_machine(plan_ps=1_000, sort_ps=200, sort_expert_ps=10)
    for sorts, ready_ps in ((True, [0, *[5_220] * 4, 0, 5_200]), (False, [0, *[5_000] * 4, 0, 5_000])):
        assert run(table, machine, workers=4, sorts=sorts)["ready_ps"].tolist() == ready_ps


def test_with_few_tokens_every_worker_routes_for_itself(run):
    machine = plain_machine(signal_ps=500, plan_ps=1_000, word_tokens=3)
    assert run(planned(tokens=3), machine, workers=3)["ready_ps"].tolist() == [0, 5_000, 5_000]
    assert run(planned(tokens=4), machine, workers=3)["ready_ps"].tolist() == [0, 5_500, 5_500]


@pytest.mark.parametrize("queue", ["ticket", "domain"])
def test_the_first_tickets_may_come_with_the_launch(run, queue):
    table = HandTable()
    for _ in range(5):
        table.task("up", flops=1)
    machine = plain_machine(ticket_ps=1_000, ticket_far_ps=1_000, num_domains=2, first_given=True)
    records = run(table, machine, workers=3, queue=queue)
    assert records["ticket_ps"][:3].tolist() == [0, 0, 0]
    assert records["worker"][:3].tolist() == [0, 1, 2]
    assert records["ticket_ps"][3:].tolist() == [1_000, 1_000]  # asked for while the first tasks run
    assert sorted(records["worker"][3:].tolist()) == [0, 1]


@pytest.mark.parametrize(("early", "asked_ps"), [(True, [0, 1_000, 2_500]), (False, [0, 2_000, 4_000])])
def test_the_next_pick_is_asked_for_as_a_task_starts_or_as_its_weights_are_there(run, early, asked_ps):
    table = HandTable()
    for _ in range(3):
        table.task("up", weights=10, flops=1)
    machine = plain_machine(ticket_ps=1_000, ask_early=early, up_overhead_ps=500)
    records = run(table, machine, queue="ticket")
    assert records["asked_ps"].tolist() == asked_ps
    # asked for early, the second one's weights follow those of the first at once
    assert records["loaded_ps"].tolist() == ([2_000, 3_000, 4_500] if early else [2_000, 4_000, 6_000])


def test_weights_take_time_from_where_they_have_arrived(run):
    table = HandTable()
    for _ in range(2):
        table.task("up", weights=30)
    records = run(table, plain_machine(feed_bytes_per_ns=5.0))  # half of what a CU streams
    assert records["loaded_ps"].tolist() == [3_000, 6_000]
    assert records["end_ps"].tolist() == [6_000, 12_000]
    assert run(table, plain_machine(feed_bytes_per_ns=20.0))["end_ps"].tolist() == [3_000, 6_000]


def test_words_are_their_own_signal(run):
    table = waiting()
    table.task("route", tokens=2)
    for word_tokens, down_ps in ((2, 5_500), (1, 7_500)):
        machine = plain_machine(release_ps=2_000, signal_ps=500, word_tokens=word_tokens)
        assert run(table, machine, workers=3)["start_ps"][1] == down_ps


def blocks(*weights):
    """An `up` for each of some weights, (expert, bytes): blocks of tokens share those of their expert."""
    table = HandTable()
    for expert, num_bytes in weights:
        table.task("up", weights=num_bytes, expert=expert, tile=0)
    return table


@pytest.mark.parametrize(
    ("hbm_bytes_per_ns", "cache_bytes", "loaded_ps"),
    [
        (10.0, 1, [10_000, 10_000]),  # one stream, and who follows it
        (10.0, 0, [20_000, 20_000]),  # two streams share the memory
        (5.0, 1, [20_000, 20_000]),  # a CU could have them after 10 ns, but then they are not there
    ],
)
def test_who_wants_weights_that_another_streams_follows_its_stream(run, hbm_bytes_per_ns, cache_bytes, loaded_ps):
    machine = plain_machine(hbm_bytes_per_ns=hbm_bytes_per_ns, cache_bytes=cache_bytes)
    records = run(blocks((0, 100), (0, 100)), machine, workers=2)
    assert records["loaded_ps"].tolist() == loaded_ps
    assert records["flags"].tolist() == [0, FROM_CACHE if cache_bytes else 0]
    assert memory_bytes(records).tolist() == [100, 0 if cache_bytes else 100]


def test_weights_stay_in_the_cache_until_so_many_others_were_read(run):
    # 5 bytes a ns from memory, 10 from the cache: 20 + 60 ns, and then 10 or 20
    bits = int(jitter.task_bits(0, 0, np.array([0]), np.array([2]))[0])
    stay = -math.log(1 - ((bits >> 40) % 4096 + 0.5) / 4096)  # over the mean, but for what a table of 4096 is off by
    for cache_bytes, last_ps in ((math.ceil(300 / stay) + 1, 50_000), (math.floor(300 / stay) - 1, 60_000)):
        machine = plain_machine(hbm_bytes_per_ns=5.0, cache_bytes=cache_bytes)
        records = run(blocks((0, 100), (1, 300), (0, 100)), machine)
        assert records["loaded_ps"].tolist() == [20_000, 80_000, 40_000 + last_ps]


def test_who_comes_when_the_first_bytes_have_left_reads_them_again(run):
    # Worker 1 asks right after worker 0. Worker 2 has 10 bytes of its own before, and more than 9 times the mean no
    # weights stay: 10 bytes each at 5 a ns, then 30 of worker 0 and 40 of worker 2 at 5 a ns, the last 10 at 10.
    table = blocks((0, 40), (1, 10), (0, 40), (0, 40))
    machine = plain_machine(cache_bytes=1, hbm_bytes_per_ns=10.0)
    records = run(table, machine, workers=3, queue="replay", lists=[[[0], [3], [1, 2]]])
    assert records["loaded_ps"].tolist() == [8_000, 2_000, 9_000, 8_000]
    assert records["flags"].tolist() == [0, 0, 0, FROM_CACHE]
    assert memory_bytes(records).tolist() == [40, 10, 40, 0]


def test_a_follower_that_comes_late_takes_its_own_time(run):
    # worker 1 first has 10 bytes of its own: 1 ns; then the other's 20, which are there at 2 ns
    records = run(
        blocks((0, 20), (1, 10), (0, 20)),
        plain_machine(cache_bytes=1_000),
        workers=2,
        queue="replay",
        lists=[[[0], [1, 2]]],
    )
    assert records["loaded_ps"].tolist() == [2_000, 1_000, 3_000]


@pytest.mark.parametrize(("in_order", "starts_ps"), [(False, [0, 5_000, 0]), (True, [0, 5_000, 6_000])])
def test_in_order_a_worker_takes_one_more_pick_and_keeps_it_for_later(run, in_order, starts_ps):
    table = waiting()
    table.task("up", flops=1)
    machine = plain_machine(in_order=in_order, prefetch=False)
    records = run(table, machine, workers=2, queue="ticket", look_ahead=1)
    assert records["ticket_ps"].tolist() == [0, 0, 0]
    assert records["worker"].tolist() == [0, 1, 1]
    assert records["start_ps"].tolist() == starts_ps


def test_in_order_a_worker_that_waits_with_a_chain_takes_nothing_more(run):
    table = HandTable()
    ready = table.event("upped")
    table.task("up", flops=5, signals=(ready,))
    table.task("down", flops=1, waits=(ready,), chain=2)
    table.task("down", flops=1, chain=0)
    table.task("up", flops=1)
    machine = plain_machine(in_order=True, prefetch=False)
    records = run(table, machine, workers=2, queue="ticket")
    assert records["worker"].tolist() == [0, 1, 1, 0]
    assert records["start_ps"].tolist() == [0, 5_000, 6_000, 5_000]


@pytest.mark.parametrize(("in_order", "worker", "start_ps"), [(False, 1, 0), (True, 0, 5_000)])
def test_in_order_a_worker_that_waits_takes_nothing_from_another_domain(run, in_order, worker, start_ps):
    table = waiting()  # ranks 0 and 2 are of domain 0, rank 1 of domain 1
    table.task("up", flops=1)
    machine = plain_machine(in_order=in_order, prefetch=False, num_domains=2)
    records = run(table, machine, workers=2, queue="domain", look_ahead=1)
    assert records["start_ps"].tolist() == [0, 5_000, start_ps]
    assert records["worker"][2] == worker


@pytest.mark.parametrize("in_order", [False, True])
def test_in_order_a_thief_takes_one_pick_at_a_time(run, in_order):
    table = HandTable()
    for rank in range(31):  # even ranks are of domain 0, long; worker 1 is done with domain 1 soon, and idle then
        table.task("up", flops=1 if rank % 2 else 10)
    machine = plain_machine(in_order=in_order, num_domains=2, ticket_ps=5_000, ticket_far_ps=1_000, ask_early=True)
    records = run(table, machine, workers=2, queue="domain")
    thief = records[records["worker"] == 1]
    thief = thief[thief["start_ps"].argsort()]
    stolen = thief["task_id"] % 2 == 0
    waits = thief["asked_ps"][1:] >= thief["end_ps"][:-1]  # asked for when the one before was done
    assert stolen.sum() >= 2
    assert waits[stolen[1:]][1:].all() == in_order
