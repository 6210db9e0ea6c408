"""The effects of the machine model, each with a switch: what does a prediction owe to it?"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any, NamedTuple

from flashmoe.machine import Machine, parameter_units

# A rate that limits nothing: any task's bytes or flops over it are less than a picosecond, which the engines count
# as none. Finite, so that a machine stays standard JSON, which knows no infinity.
UNLIMITED = 1e30


class Effect(NamedTuple):
    """What an effect models, in a sentence, and a function that gives a machine without it."""

    what: str
    off: Callable[[Machine], Machine]


def _set(**neutral: Any) -> Callable[[Machine], Machine]:
    return lambda machine: replace(machine, **neutral)


EFFECTS: dict[str, Effect] = {
    "memory_sharing": Effect(
        "The workers of a PE share its memory bandwidth. Without: each streams at its own cap, and as no load "
        "comes near the limit, signals see an idle memory.",
        _set(hbm_bytes_per_ns=UNLIMITED),
    ),
    "knee": Effect(
        "Near the number of streams that saturates the memory, a stream gets less than both its cap and its share. "
        "Without: the lesser of the two.",
        _set(knee=0.0),
    ),
    "prefetch": Effect(
        "Weights stream before a task's inputs are ready. Without: only once they are there.",
        _set(prefetch=False),
    ),
    "launch_ramp": Effect(
        "A launch takes time, and workers start one after the other. Without: all start at once, at time zero.",
        _set(launch_ps=0, launch_domain_ps=0, launch_step_ps=0, prologue_ps=0),
    ),
    "ticket": Effect(
        "A ticket takes time, and a counter serves one worker at a time. Without: tickets are free.",
        _set(ticket_ps=0, ticket_far_ps=0, ticket_service_ps=0, ticket_far_service_ps=0),
    ),
    "first_given": Effect(
        "The first tickets come with the launch. Without: workers ask for them, as for all others.",
        _set(first_given=False),
    ),
    "ask_early": Effect(
        "A worker takes its next pick a task ahead. Without: only when its stream has nothing more to do.",
        _set(ask_early=False),
    ),
    "in_order": Effect(
        "A worker runs its picks in the order in which it took them. Without: what is ready first, of as many as the "
        "policy's look-ahead says.",
        _set(in_order=False),
    ),
    "signal": Effect(
        "It takes a while until another worker of the PE sees a signal. Without: it sees it at once.",
        _set(signal_ps=0, signal_near_ps=0),
    ),
    "signal_load": Effect(
        "Signals are slower beside memory traffic. Without: as on an idle memory.",
        _set(signal_load_factor=1.0),
    ),
    "signal_distance": Effect(
        "Signals inside a domain are faster than those across. Without: all are as slow as those across.",
        lambda machine: replace(machine, signal_near_ps=machine.signal_ps),
    ),
    "release": Effect(
        "A task's stores are made visible before it signals, one after the other. Without: they are at once.",
        _set(release_ps=0),
    ),
    "release_load": Effect(
        "Releases are slower beside memory traffic. Without: as on an idle memory.",
        _set(release_load_factor=1.0),
    ),
    "finish_beside": Effect(
        "Some warps end a task while others are at the next. Without: a worker does one thing after the other.",
        _set(finish_beside=False),
    ),
    "words": Effect(
        "With few tokens results travel as words that are their own signal, and every worker routes for itself. "
        "Without: as with many tokens.",
        _set(word_tokens=0),
    ),
    "plan": Effect(
        "Every worker makes lists of its experts' tokens, sorted as the order says, before it can run what follows. "
        "Without: it has them.",
        _set(plan_ps=0, plan_token_ps=0, sort_ps=0, sort_expert_ps=0),
    ),
    "link_latency": Effect(
        "A put takes a while to be seen by the other PE, beyond its bytes. Without: only its bytes take time.",
        _set(put_ps=0),
    ),
    "link_bandwidth": Effect(
        "Messages queue for links and ports and hold them for a time. Without: they only have their latency.",
        _set(link_bytes_per_ns=UNLIMITED, port_bytes_per_ns=0.0, link_message_ps=0),
    ),
    "remote_stores": Effect(
        "A worker is busy while it stores to another PE. Without: it goes on at once.",
        _set(store_bytes_per_ns=UNLIMITED),
    ),
    "activations": Effect(
        "A task reads its tokens' rows and writes what it makes, at a CU's rate from the cache. Without: for nothing.",
        _set(cache_bytes_per_ns=UNLIMITED, cache_idle_bytes_per_ns=0.0),
    ),
    "reuse": Effect(
        "What another task streams, or has streamed a short while ago, may come from the cache: the memory does not "
        "notice. Without: every task streams its weights from memory.",
        _set(cache_bytes=0),
    ),
    "feed": Effect(
        "A CU takes time to move weights that have arrived into its products. Without: none.",
        _set(feed_bytes_per_ns=0.0),
    ),
    "matrix_rate": Effect(
        "Arithmetic takes time. Without: tasks stream weights and activations, and the rest is free.",
        _set(cu_flops_per_ns=UNLIMITED),
    ),
    "matrix_padding": Effect(
        "Matrix instructions work on whole tiles of tokens and rows. Without: only what is there costs time.",
        _set(matrix_tokens=1, matrix_rows=1),
    ),
    "overhead": Effect(
        "A task has a fixed part by kind: fences, barriers, reductions. Without: none.",
        _set(**{key: 0 for key in parameter_units() if key.endswith("_overhead_ps")}),
    ),
    "jitter": Effect(
        "Equal tasks take different times. Without: all take the mean.",
        _set(jitter=0.0, jitter_bytes=0),
    ),
    "stalls": Effect(
        "A few tasks take much longer. Without: none does.",
        _set(stall_probability=0.0, stall_ps=0),
    ),
    "pe_spread": Effect(
        "Some PEs are faster than others all the time. Without: all run at the nominal speed.",
        _set(pe_spread=0.0),
    ),
    "bookkeeping": Effect(
        "A worker has bookkeeping to do between two tasks. Without: the next one follows at once.",
        _set(gap_ps=0),
    ),
}


def without(machine: Machine, names: Iterable[str]) -> Machine:
    """The machine with some effects of EFFECTS switched off; what changed has no origin any more.

    Raises: ValueError naming an unknown effect and the known ones.
    """
    simpler = machine
    for name in names:
        if name not in EFFECTS:
            raise ValueError(f"unknown effect {name!r} (effects: {', '.join(EFFECTS)})")
        simpler = EFFECTS[name].off(simpler)
    kept = {key: origin for key, origin in machine.origins.items() if getattr(machine, key) == getattr(simpler, key)}
    return replace(simpler, origins=kept)
