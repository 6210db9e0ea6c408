"""Where nothing but the tasks takes time an engine is a list scheduler: the same ends as schedulers of a few lines,
the theorems of scheduling theory, and its anomalies."""

import numpy as np
import pytest
from sim.oracles.graphs import (
    Graph,
    in_fixed_order,
    in_ready_order,
    in_ticket_order,
    shortest_makespan_ps,
    with_stealing,
)

QUEUES = ("ticket", "domain", "static", "push")
NUM_WORKERS = (1, 2, 3, 7)


def random_graphs(num_graphs, num_tasks, most_before=3):
    rng = np.random.default_rng(num_tasks)
    return [Graph.random(rng, num_tasks, most_before) for _ in range(num_graphs)]


@pytest.mark.parametrize("num_workers", NUM_WORKERS)
@pytest.mark.parametrize(
    ("queue", "schedule"), [("ticket", in_ticket_order), ("push", in_ready_order), ("static", in_fixed_order)]
)
def test_random_graphs_end_when_a_list_scheduler_says(engine, num_workers, queue, schedule):
    for graph in random_graphs(12, 80):
        assert graph.run(engine, num_workers, queue=queue) == schedule(graph, num_workers)


@pytest.mark.parametrize(("num_workers", "num_domains"), [(1, 1), (4, 2), (7, 3), (6, 6)])
def test_stealing_between_domains(engine, num_workers, num_domains):
    for graph in random_graphs(12, 81, most_before=0):
        ends_ps = graph.run(engine, num_workers, num_domains=num_domains, queue="domain")
        assert ends_ps == with_stealing(graph, num_workers, num_domains)


@pytest.mark.parametrize("queue", QUEUES)
def test_no_schedule_beats_the_bounds(engine, queue):
    for graph in random_graphs(12, 50):
        for num_workers in NUM_WORKERS:
            assert max(graph.run(engine, num_workers, queue=queue)) >= graph.bound_ps(num_workers)


@pytest.mark.parametrize("queue", QUEUES)
def test_one_worker_takes_the_sum(engine, queue):
    for graph in random_graphs(5, 30):
        assert max(graph.run(engine, 1, queue=queue)) == graph.work_ps


@pytest.mark.parametrize("queue", QUEUES)
@pytest.mark.parametrize(("num_tasks", "num_workers"), [(1, 4), (8, 4), (9, 4), (23, 5)])
def test_equal_tasks_take_whole_rounds(engine, queue, num_tasks, num_workers):
    ends_ps = Graph.independent([1_000] * num_tasks).run(engine, num_workers, queue=queue)
    assert max(ends_ps) == -(-num_tasks // num_workers) * 1_000


def test_the_order_of_equal_tasks_does_not_matter(engine):
    """Ten chains of four tasks, mixed in any way: first ready, first run keeps them level to the end."""
    rng = np.random.default_rng(3)
    makespans = set()
    for _ in range(8):
        chain_of = rng.permutation(np.repeat(np.arange(10), 4)).tolist()
        before = [[i for i in range(task) if chain_of[i] == chain][-1:] for task, chain in enumerate(chain_of)]
        makespans.add(max(Graph([500] * 40, before).run(engine, 3, queue="push")))
    assert makespans == {14 * 500}  # 40 tasks, 3 workers


# --- how far from the best


def test_work_in_order_of_readiness_keeps_to_grahams_bound(engine):
    """Work over workers plus the critical path's share: at most 2 - 1/M times the best. Source: Graham 1969."""
    for graph in random_graphs(20, 40):
        for num_workers in (2, 3, 5):
            makespan_ps = max(graph.run(engine, num_workers, queue="push"))
            grahams_ps = graph.work_ps + (num_workers - 1) * graph.critical_path_ps
            assert makespan_ps * num_workers <= grahams_ps


@pytest.mark.parametrize("queue", ["ticket", "domain", "push"])
@pytest.mark.parametrize("num_workers", [2, 3, 8])
def test_grahams_bound_is_tight(engine, queue, num_workers):
    """Short tasks first, so that the long one starts when all others are done: 2M - 1, the best is M."""
    lengths = [1_000] * (num_workers * (num_workers - 1)) + [num_workers * 1_000]
    assert max(Graph.independent(lengths).run(engine, num_workers, queue=queue)) == (2 * num_workers - 1) * 1_000
    assert max(Graph.independent(lengths[::-1]).run(engine, num_workers, queue=queue)) == num_workers * 1_000


@pytest.mark.parametrize("num_workers", [2, 3])
def test_longest_first_keeps_to_its_bound(engine, num_workers):
    """At most 4/3 - 1/(3M) times the best, which is found by trying everything. Source: Graham 1969."""
    rng = np.random.default_rng(num_workers)
    ratios = []
    for _ in range(40):
        lengths = sorted(rng.integers(1, 30, 9).tolist(), reverse=True)
        best = shortest_makespan_ps(lengths, num_workers)
        ratios.append(max(Graph.independent(lengths).run(engine, num_workers, queue="ticket")) / best)
    assert min(ratios) == 1
    assert 1 < max(ratios) <= 4 / 3 - 1 / (3 * num_workers)


@pytest.mark.parametrize("num_workers", [2, 3, 5, 8])
def test_the_bound_of_longest_first_is_tight(engine, num_workers):
    """2M + 1 tasks, two of each length from 2M - 1 to M + 1 and three of M: 4M - 1, the best is 3M."""
    m = num_workers
    lengths = [length for length in range(2 * m - 1, m, -1) for _ in range(2)] + [m] * 3
    graph = Graph.independent(lengths)
    assert len(lengths) == 2 * m + 1
    assert max(graph.run(engine, m, queue="ticket")) == 4 * m - 1
    # the best: the longest with the shortest of the pairs, and the three of M on one worker
    best = [[i, 2 * (m - 1) - 1 - i] for i in range(m - 1)] + [[2 * m - 2, 2 * m - 1, 2 * m]]
    assert max(graph.run(engine, m, lists=best, queue="replay")) == 3 * m


# --- anomalies: less to do, or more to do it with, and it takes longer

# Source: Graham 1969, SIAM Journal on Applied Mathematics 17(2), figure 1. Task 9 waits for 1; 5 to 8 wait for 4.
GRAHAM = Graph(
    [3_000, 2_000, 2_000, 2_000, 4_000, 4_000, 4_000, 4_000, 9_000], [[], [], [], [], [3], [3], [3], [3], [0]]
)


def test_grahams_nine_tasks(engine):
    # 1 2 3 at 0; 4 at 2 ns; 9 at 3 ns on the worker of 1; 5 6 at 4 ns, 7 8 at 8 ns on the others
    assert GRAHAM.run(engine, 3, queue="push") == [3_000, 2_000, 2_000, 4_000, 8_000, 8_000, 12_000, 12_000, 12_000]


def test_one_more_worker_makes_it_slower(engine):
    # 4 ends at 2 ns, so 5 6 7 start then, 8 at 3 ns, and 9 has to wait until 6 ns
    assert max(GRAHAM.run(engine, 4, queue="push")) == 15_000


def test_shorter_tasks_make_it_slower(engine):
    # all by 1 ns, but for 1 ps of task 1: what 4 makes ready comes before task 9
    shorter = [length - 1_000 for length in GRAHAM.lengths_ps]
    shorter[0] += 1
    # 4 ends at 2 ns: 5 6 then, 7 at 2.001 ns, 8 and 9 at 5 ns
    assert max(Graph(shorter, GRAHAM.before).run(engine, 3, queue="push")) == 13_000


def test_fewer_dependencies_make_it_slower(engine):
    # 5 and 6 no longer wait: 5 at 2 ns, 6 at 3 ns, and 9 not before 4 ns
    free = [[] if task in (4, 5) else before for task, before in enumerate(GRAHAM.before)]
    assert max(Graph(GRAHAM.lengths_ps, free).run(engine, 3, queue="push")) == 13_000
