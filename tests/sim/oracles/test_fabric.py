"""Links and ports in closed form. One byte takes 1 ps on a link and, where ports have a limit, 3 ps at a port.

Every message is sent by a task of no length; a task that waits for it says when it was seen.
"""

import itertools

import pytest
from sim.oracles.stations import unit_machine
from sim.tables import HandTable, run_engine

SIZE = 1_000  # bytes
PORT_PS = 3 * SIZE  # of a message
LATENCY_PS = 70
MESH = unit_machine(put_ps=LATENCY_PS)
SWITCH = unit_machine(put_ps=LATENCY_PS, port_bytes_per_ns=1000.0 / 3)


def seen_ps(engine, machine, num_pes, messages):
    """messages: (source, destination) of SIZE bytes, or (source, destination, bytes), all sent at 0, those of one
    source in this order. Returns: when each of them is seen [ps]."""
    table = HandTable(num_pes)
    seen = [table.event("gated", message[1]) for message in messages]
    for pe in range(num_pes):
        sent = [(event, (*message, SIZE)[2]) for message, event in zip(messages, seen, strict=True) if message[0] == pe]
        if sent:
            table.task("gate", pe=pe, signals=sent)
        for message, event in zip(messages, seen, strict=True):
            if message[1] == pe:
                table.task("gate", pe=pe, waits=[event])
    records = run_engine(engine, table, machine, workers=len(messages) + 1, queue="ticket")
    # the tasks that wait come by PE, then by message
    waited = records["ready_ps"][table.wait_ptr[1:] > table.wait_ptr[:-1]].tolist()
    order = sorted(range(len(messages)), key=lambda index: (messages[index][1], index))
    return [ready_ps for _, ready_ps in sorted(zip(order, waited, strict=True))]


@pytest.mark.parametrize("num_bytes", [0, 1, 4096])
def test_a_message_alone_takes_latency_and_its_bytes_at_the_narrowest_place(engine, num_bytes):
    assert seen_ps(engine, MESH, 2, [(0, 1, num_bytes)]) == [LATENCY_PS + num_bytes]
    assert seen_ps(engine, SWITCH, 2, [(0, 1, num_bytes)]) == [LATENCY_PS + 3 * num_bytes]


@pytest.mark.parametrize("num_senders", [1, 2, 7])
def test_many_senders_and_one_sink(engine, num_senders):
    messages = [(source, num_senders) for source in range(num_senders)]
    assert seen_ps(engine, MESH, 8, messages) == [LATENCY_PS + SIZE] * num_senders
    assert seen_ps(engine, SWITCH, 8, messages) == [LATENCY_PS + k * PORT_PS for k in range(1, num_senders + 1)]


@pytest.mark.parametrize("num_sinks", [1, 2, 7])
def test_one_sender_and_many_sinks(engine, num_sinks):
    messages = [(0, sink) for sink in range(1, num_sinks + 1)]
    assert seen_ps(engine, MESH, 8, messages) == [LATENCY_PS + SIZE] * num_sinks
    assert seen_ps(engine, SWITCH, 8, messages) == [LATENCY_PS + k * PORT_PS for k in range(1, num_sinks + 1)]


@pytest.mark.parametrize("num_pes", [2, 4, 8])
def test_all_to_all(engine, num_pes):
    """On a mesh every pair has a link. A switch takes as long as its ports are busy if everybody starts with the next
    PE; if all send to PE 0 first, to PE 1 then, and so on, they get in each other's way at the sinks."""
    in_turn = [(pe, (pe + step) % num_pes) for step in range(1, num_pes) for pe in range(num_pes)]
    ports_ps = LATENCY_PS + (num_pes - 1) * PORT_PS
    assert set(seen_ps(engine, MESH, num_pes, in_turn)) == {LATENCY_PS + SIZE}
    assert max(seen_ps(engine, SWITCH, num_pes, in_turn)) == ports_ps
    in_step = [(pe, sink) for sink in range(num_pes) for pe in range(num_pes) if pe != sink]
    assert max(seen_ps(engine, SWITCH, num_pes, in_step)) >= ports_ps
    if num_pes > 2:
        assert max(seen_ps(engine, SWITCH, num_pes, in_step)) > ports_ps


@pytest.mark.parametrize(("machine", "byte_ps"), [(MESH, 1), (SWITCH, 3)])
@pytest.mark.parametrize("num_pes", [2, 3, 8])
def test_a_ring_of_reduce_scatter_and_all_gather(engine, machine, byte_ps, num_pes):
    """2 (p - 1) steps; in each of them everybody sends 1/p of the bytes to the next PE."""
    table = HandTable(num_pes)
    steps = 2 * (num_pes - 1)
    arrived = [[table.event("gated", (pe + 1) % num_pes) for _ in range(steps)] for pe in range(num_pes)]
    for pe, step in itertools.product(range(num_pes), range(steps)):
        before = [arrived[pe - 1][step - 1]] if step else []
        table.task("gate", pe=pe, waits=before, signals=[(arrived[pe][step], SIZE)])
        if step == steps - 1:
            table.task("gate", pe=pe, waits=[arrived[pe - 1][step]])
    records = run_engine(engine, table, machine, queue="ticket")
    assert records["end_ps"].max() == steps * (LATENCY_PS + byte_ps * SIZE)
