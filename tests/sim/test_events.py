"""Who sees when that an event is complete: by hand, two domains, far signals 1000 ps, near ones 300 ps."""

from types import SimpleNamespace

import pytest
import simpy
from hypothesis import given, settings
from hypothesis import strategies as st

from flashmoe.sim.events import Events

FAR_PS, NEAR_PS = 1_000, 300


class Scene:
    """Two workers in domain 0, one in domain 1, and one event per target."""

    def __init__(self, *targets):
        self.env = simpy.Environment(0)
        self.events = Events(self.env, list(targets))
        self.ann, self.bob, self.eve = (SimpleNamespace(domain=domain) for domain in (0, 0, 1))

    def signal(self, at_ps, worker, event=0):
        self.env.run(until=at_ps) if at_ps > self.env.now else None
        self.events.signal(event, worker, at_ps + FAR_PS, at_ps + NEAR_PS)

    def message(self, at_ps, lands_ps, event=0):
        self.env.run(until=at_ps) if at_ps > self.env.now else None
        self.events.signal(event, None, lands_ps, lands_ps)

    def seen(self, event=0):
        """By ann, bob, eve, and by everybody."""
        return [self.events.seen_ps(event, worker) for worker in (self.ann, self.bob, self.eve, None)]


def test_a_worker_sees_its_own_signal_at_once_its_domain_soon_and_others_later():
    scene = Scene(1)
    scene.signal(50, scene.ann)
    assert scene.seen() == [50, 350, 1_050, 1_050]


def test_nobody_sees_an_event_before_the_last_signal_is_made():
    scene = Scene(2)
    scene.signal(50, scene.ann)
    scene.env.run(until=5_000)
    assert not scene.events.is_seen(0, scene.ann)
    scene.signal(5_000, scene.ann)
    assert [scene.events.is_seen(0, worker) for worker in (scene.ann, scene.bob, scene.eve, None)] == [True] + [
        False
    ] * 3
    assert scene.seen() == [5_000, 5_300, 6_000, 6_000]


def test_signals_of_two_domains():
    scene = Scene(2)
    scene.signal(0, scene.ann)  # seen by eve at 1000
    scene.signal(100, scene.eve)  # seen by ann and bob at 1100
    assert scene.seen() == [1_100, 1_100, 1_000, 1_100]  # eve: her own does not help while ann's is on its way
    scene = Scene(2)
    scene.signal(0, scene.ann)
    scene.signal(2_000, scene.eve)
    assert scene.seen() == [3_000, 3_000, 2_000, 3_000]


def test_signals_of_one_domain_and_then_another_and_then_the_first():
    scene = Scene(3)
    for at_ps, worker in ((0, scene.ann), (100, scene.eve), (200, scene.bob)):
        scene.signal(at_ps, worker)
    # domain 0 waits for eve's, until 1100; eve for bob's, until 1200
    assert scene.seen() == [1_100, 1_100, 1_200, 1_200]


def test_a_neighbours_signal_that_has_landed_long_ago():
    scene = Scene(2)
    scene.signal(0, scene.ann)
    scene.signal(4_000, scene.bob)
    assert scene.seen() == [4_300, 4_000, 5_000, 5_000]


def test_a_message_lands_for_everybody_at_once():
    scene = Scene(1)
    scene.message(50, 700)
    assert scene.seen() == [700] * 4


def test_a_message_on_its_way_holds_up_who_signals_last():
    scene = Scene(2)
    scene.message(50, 700)
    scene.signal(100, scene.ann)
    assert scene.seen() == [700, 700, 1_100, 1_100]


@given(st.lists(st.tuples(st.integers(0, 3), st.sampled_from([0, 100, 200, 400, 2_000])), min_size=1, max_size=5))
@settings(max_examples=200, deadline=None, derandomize=True)
def test_nobody_sees_an_event_before_all_of_its_signals(signals):
    scene = Scene(len(signals))
    workers = (scene.ann, scene.bob, scene.eve)
    now_ps, lands_ps = 0, {worker: [] for worker in range(4)}  # 3: everybody
    for maker, after_ps in signals:
        now_ps += after_ps
        if maker == 3:
            scene.message(now_ps, now_ps + 600)
        else:
            scene.signal(now_ps, workers[maker])
        for worker in range(4):
            same_domain = maker < 2 and worker < 2
            delay_ps = 0 if worker == maker else NEAR_PS if same_domain else FAR_PS
            lands_ps[worker].append(now_ps + (600 if maker == 3 else delay_ps))
    seen_ps = scene.seen()
    everybody_ps = max(max(lands_ps[worker]) for worker in range(4))
    assert seen_ps[3] <= everybody_ps
    for worker in range(3):
        assert max(lands_ps[worker]) <= seen_ps[worker] <= everybody_ps


def test_an_event_without_signals_is_seen_from_the_start():
    scene = Scene(0)
    assert scene.seen() == [0] * 4
    assert scene.events.is_seen(0, None)


def test_one_signal_too_many_changes_nothing():
    scene = Scene(1)
    scene.signal(50, scene.ann)
    scene.signal(60, scene.eve)
    assert scene.seen() == [50, 350, 1_050, 1_050]


@pytest.mark.parametrize("late", [False, True])
def test_who_waits_is_woken_as_the_event_lands_in_its_domain(late):
    scene = Scene(1)
    woken = []

    def wait(name, domain):
        scene.events.call_when_landed(0, lambda: woken.append((scene.env.now, name)), domain)

    if late:
        scene.signal(50, scene.ann)
    wait("eve", 1)
    wait("everybody", -1)
    wait("bob", 0)
    wait("bob again", 0)
    if not late:
        scene.signal(50, scene.ann)
    scene.env.run()
    assert woken == [(350, "bob"), (350, "bob again"), (1_050, "eve"), (1_050, "everybody")]
