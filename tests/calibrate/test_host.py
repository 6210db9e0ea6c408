"""The host as a machine. What it measures depends on the machine; what follows from it does not."""

import numpy as np

import flashmoe as fm
from flashmoe.calibrate import host_machine, num_cores


def test_a_host_is_a_machine_of_threads():
    host = host_machine(0.2)
    assert host.name == "host"
    assert host.num_cores == num_cores()
    assert not host.prefetch  # only a running thread loads anything
    assert host.hbm_bytes_per_ns >= host.cu_bytes_per_ns  # all cores together stream no less than one
    assert host.signal_near_ps == host.signal_ps
    assert host_machine(0.2) is host  # once a process


def test_threads_start_one_after_the_other_whatever_their_domain():
    host = host_machine(0.2)
    start_ps = [
        worker % host.num_domains * host.launch_domain_ps + worker // host.num_domains * host.launch_step_ps
        for worker in range(5)
    ]
    assert start_ps == [worker * host.launch_domain_ps for worker in range(5)]


def test_what_a_host_cannot_tell_is_left_out():
    host = host_machine(0.2)
    assert (host.jitter, host.pe_spread, host.stall_ps, host.knee, host.port_bytes_per_ns) == (0, 0, 0, 0, 0)
    assert (host.matrix_tokens, host.matrix_rows, host.launch_ps) == (1, 1, 0)
    assert host.origins.keys().isdisjoint({"jitter", "knee", "port_bytes_per_ns", "launch_ps"})


def test_every_value_says_whether_it_was_measured():
    origins = host_machine(0.2).origins
    measured = {key for key, (_, origin, _) in origins.items() if origin == "measured"}
    assert {"cu_bytes_per_ns", "cu_flops_per_ns", "signal_ps", "gap_ps", "slice_ps"} <= measured
    assert measured.isdisjoint({"num_pes_max", "prefetch", "up_overhead_ps"})


def test_a_layer_can_be_simulated_on_the_host_that_ran_it():
    model = fm.MoEModel(d_model=64, d_ff=48, num_experts=8, top_k=2, dtype="f32")
    x = [np.random.default_rng(pe).standard_normal((3, 64)) for pe in range(2)]
    result = fm.run(model, fm.Weights.random(model), x, workers=2)
    simulated = fm.simulate(model, machine=host_machine(0.2), routing=result.routing, policy="ticket", workers=2)
    comparison = fm.compare(simulated, result.trace).to_dict()
    assert comparison["matched"] == len(result.trace.records)
    assert comparison["unmatched_left"] == comparison["unmatched_right"] == 0
    assert comparison["warnings"] == []
