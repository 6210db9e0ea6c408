"""Device layers over a library that has the interface of hip_src/device/api.h, and no device."""

import ctypes as c
import gc
import json
import subprocess
from pathlib import Path
from types import SimpleNamespace

import ml_dtypes
import numpy as np
import pytest
from typer.testing import CliRunner

import flashmoe as fm
from flashmoe.cli import app
from flashmoe.hw import BuildError, DeviceError, DeviceLayer, LaunchError, PackedWeights, driver, library, tuned
from flashmoe.hw.build import source_folder
from flashmoe.hw.tuned import tuned_ranges
from flashmoe.model import MODEL_PRESETS
from flashmoe.policy import QUEUES, Policy
from flashmoe.routing import Routing
from flashmoe.schedule import to_schedule
from flashmoe.tasks import TaskTable, Tiling

MODEL = fm.MoEModel(d_model=64, d_ff=128, num_experts=8, top_k=2, name="fake")
WEIGHTS = fm.Weights.random(MODEL, seed=1)
ROWS = Tiling(down="rows", down_rows=16)
STRUCTURES = [
    library.FlashmoeShape,
    library.FlashmoeTiling,
    library.FlashmoeConfig,
    library.FlashmoeWeights,
    library.FlashmoeInput,
    library.FlashmoeFault,
    library.FlashmoeDevice,
]


def compile_c(source, made, *flags):
    includes = ["-I", str(source_folder() / "device")]
    command = ["gcc", "-std=c11", "-Wall", "-Wextra", "-Werror", *includes, *flags, str(source), "-o", str(made)]
    subprocess.run(command, check=True)
    return made


def compile_fake(folder, *flags):
    sizes = ("d_model", "d_ff", "num_experts", "top_k")
    defines = [f"-DFLASHMOE_{name.upper()}={getattr(MODEL, name)}" for name in sizes]
    made = folder / f"fake{len(list(folder.iterdir()))}.so"
    return compile_c(Path(__file__).parent / "fake_library.c", made, "-shared", "-fPIC", *defines, *flags)


@pytest.fixture(scope="module")
def fake_path(tmp_path_factory):
    return compile_fake(tmp_path_factory.mktemp("fake"))


def use(monkeypatch, path):
    monkeypatch.setattr(library, "check_driver", lambda backend: None)
    monkeypatch.setattr(library, "build_library", lambda model, target, progress: path)
    library.load_library.cache_clear()


@pytest.fixture
def fake(monkeypatch, fake_path):
    """What the library saw."""
    use(monkeypatch, fake_path)
    dll = c.CDLL(str(fake_path))

    def last(name, kind):
        return lambda: kind.in_dll(dll, f"fake_{name}")

    yield SimpleNamespace(
        count=lambda name: c.c_int.in_dll(dll, f"fake_{name}").value,
        fail_next=lambda: setattr(c.c_int.in_dll(dll, "fake_fails"), "value", 1),
        config=last("config", library.FlashmoeConfig),
        input=last("input", library.FlashmoeInput),
        stream=lambda: c.c_void_p.in_dll(dll, "fake_stream").value,
    )
    library.load_library.cache_clear()


def make(**options):
    return DeviceLayer(MODEL, options.pop("weights", WEIGHTS), **{"ep_size": 1, "max_tokens": 40, **options})


def tokens(*counts):
    rng = np.random.default_rng(3)
    return [rng.standard_normal((count, MODEL.d_model)).astype(MODEL.numpy_dtype) for count in counts]


def test_structures_are_field_for_field_those_of_the_header(tmp_path):
    lines = ["#include <stddef.h>", "#include <stdio.h>", '#include "api.h"', "int main(void) {"]
    wanted = []
    for structure in STRUCTURES:
        name = structure.__name__
        lines.append(f'  printf("{name} %zu\\n", sizeof({name}));')
        wanted.append(f"{name} {c.sizeof(structure)}")
        for field, *_ in structure._fields_:
            lines.append(
                f'  printf("{name}.{field} %zu %zu\\n", offsetof({name}, {field}), sizeof((({name}*)0)->{field}));'
            )
            at = getattr(structure, field)
            wanted.append(f"{name}.{field} {at.offset} {at.size}")
    lines += ['  printf("%d %d\\n", FLASHMOE_ABI, FLASHMOE_MAX_PES);', "  return 0;", "}"]
    (tmp_path / "sizes.c").write_text("\n".join(lines))
    program = compile_c(tmp_path / "sizes.c", tmp_path / "sizes")
    seen = subprocess.run([program], check=True, capture_output=True, text=True).stdout.splitlines()
    assert seen == [*wanted, f"{library.ABI} {library.MAX_PES}"]


# ---- launches


def test_arrays_go_to_the_card_and_back_and_nothing_stays_there(fake):
    gc.collect()  # layers of other tests
    layer = make(ep_size=4, policy="ticket")
    kept = fake.count("buffers")
    x = tokens(3, 0, 5, 1)
    result = layer(x, seed=9)
    assert [out.tobytes() for out in result.outputs] == [rows.tobytes() for rows in x]
    assert all(out.dtype == MODEL.numpy_dtype for out in result.outputs)
    assert list(fake.input().num_tokens[:4]) == [3, 0, 5, 1]
    assert not any(fake.input().topk_idx_device)
    assert [idx.tolist() for idx in result.routing.topk_idx] == [[[0, 1]] * 3, [], [[0, 1]] * 5, [[0, 1]]]
    header = result.trace.header
    assert (header["executor"], header["machine"], header["device"]) == ("cuda", "sm_90", "Fake H200")
    assert (header["kernel"], header["policy"], header["seed"], header["ep_size"]) == ("fake", "ticket", 9, 4)
    assert (header["num_workers"], header["drops"]) == (3, 12)  # the fake drops one of each worker
    assert fake.count("buffers") == kept
    layers = fake.count("layers")
    del layer
    assert fake.count("layers") == layers - 1
    assert fake.count("buffers") == kept - 3


def test_the_configuration_reaches_the_library(fake):
    tiling = Tiling(down="rows", up_rows=16, down_rows=32, experts_per_pick=2)
    layer = make(
        policy="expert_lpt", tiling=tiling, workers=5, domains=9, deadline_s=0.25, trace=False, kernel="general"
    )
    layer(tokens(2))
    config = fake.config()
    assert (config.num_pes, config.max_tokens, config.num_workers, config.num_domains) == (1, 40, 5, 5)
    assert (config.queue, config.order, config.look_ahead) == (QUEUES.index("domain"), 4, 4)
    assert (config.trace_capacity, config.kernel, config.deadline_ns) == (0, 1, 250_000_000)
    named = {name: getattr(config.tiling, name) for name, _ in library.FlashmoeTiling._fields_}
    assert named == {**tiling.to_dict(), "granularity": 0, "down": 1}


def test_pointers_are_passed_on_as_they_are(fake):
    layer = make(ep_size=2, policy="ticket")
    x, out = tokens(4, 4), tokens(4, 4)
    at = [[rows.ctypes.data // 16 * 16 for rows in arrays] for arrays in (x, out)]
    before = fake.count("mallocs"), fake.count("synchronizes")
    layer.launch(*at, [2, 1], topk_idx=[16, 32], topk_weights=[48, 64], stream=77)
    assert (fake.count("mallocs"), fake.count("synchronizes")) == before
    seen = fake.input()
    assert [list(pointers[:2]) for pointers in (seen.x_device, seen.out_device)] == at
    assert [list(pointers[:2]) for pointers in (seen.topk_idx_device, seen.topk_weights_device)] == [[16, 32], [48, 64]]
    assert (list(seen.num_tokens[:2]), fake.stream()) == ([2, 1], 77)
    trace, routing = layer.last_run(seed=4)
    assert (trace.header["gate_inside"], trace.header["seed"]) == (False, 4)
    assert routing.num_tokens == (2, 1)


def test_what_a_launch_refuses(fake):
    layer = make(ep_size=2, policy="ticket")
    with pytest.raises(ValueError, match="nothing was launched"):
        layer.last_run()
    for arguments, options, named in (
        (([16], [32], [1]), {}, "must be one per PE, 2"),
        (([16, 16], [32, 32], [1, 41]), {}, "41 tokens .*max_tokens=40"),
        (([16, 24], [32, 32], [1, 1]), {}, "16 bytes"),
        (([16, 16], [32, 32], [1, 1]), {"topk_idx": [16, 16]}, "both or neither"),
        (([16, 16], [32, 32], [1, 1]), {"topk_idx": [16], "topk_weights": [16, 16]}, "must be one per PE, 2"),
    ):
        with pytest.raises(ValueError, match=named):
            layer.launch(*arguments, **options)
    for x, named in (
        (tokens(1), "x: 1 arrays"),
        (tokens(1, 41), r"x\[1\]: 41 tokens"),
        ([*tokens(1), np.zeros((1, 63))], r"x\[1\]: shape \(1, 63\)"),
    ):
        with pytest.raises(ValueError, match=named):
            layer(x)
    with pytest.raises(ValueError, match=r"routing for \[1, 1\] tokens"):
        layer(tokens(1, 2), routing=Routing.uniform(MODEL, [1, 1], 2))


def test_a_given_routing(fake):
    routing = Routing.zipf(MODEL, [3, 2], 2, seed=5)
    result = make(ep_size=2, policy="ticket")(tokens(3, 2), routing=routing)
    assert result.routing is routing
    assert result.trace.header["gate_inside"] is False
    assert all(fake.input().topk_idx_device[:2]) and all(fake.input().topk_weights_device[:2])


@pytest.mark.parametrize("ep_size", [1, 2])
def test_tuned_goes_by_the_tokens_of_a_launch(fake, ep_size):
    layer = make(ep_size=ep_size, max_tokens=300)
    ranges = tuned_ranges(300)
    assert layer.workspace_bytes == sum(1000 + most for most, _ in ranges)
    for most, policy in ranges:
        result = layer(tokens(most, *[0] * (ep_size - 1)))
        assert fake.config().queue == QUEUES.index(policy.queue)
        assert result.trace.header["tiling"] == policy.tiling.to_dict()
        assert result.trace.header["policy"] == "tuned"
        if most < 300:
            layer(tokens(most + 1, *[0] * (ep_size - 1)))
            assert fake.config().max_tokens > most


def test_tuned_ranges_are_what_tuned_says_and_end_at_max_tokens():
    for max_tokens in (0, 1, 8, 9, 64, 1024):
        ranges = tuned_ranges(max_tokens)
        assert [most for most, _ in ranges] == sorted({most for most, _ in ranges})
        assert ranges[-1][0] == max_tokens
        assert all(policy == tuned(most) for most, policy in ranges)
    with pytest.raises(ValueError, match="num_tokens=1025"):
        tuned(1025)


def by_count(task):
    return -task.num_tokens


@pytest.mark.parametrize("gate", [True, False])
def test_lists_are_made_for_the_routing(fake, gate):
    policy = Policy(name="by_count", queue="static", rank=by_count, tiling=ROWS)
    routing = Routing.zipf(MODEL, [6], 1, seed=2)
    layer = make(policy=policy)
    with pytest.raises(ValueError, match="follows lists"):
        layer.launch([16], [32], [1])
    x = tokens(6)
    result = layer(x, routing=None if gate else routing)
    if gate:  # the reference's choice, as the fake's own is no choice
        from flashmoe.reference import gate_logits, route

        idx, weights = route(gate_logits(MODEL, WEIGHTS, x[0]), MODEL)
        routing = Routing((idx,), (weights,), MODEL.num_experts)
    table = TaskTable(MODEL, routing, ROWS, gate=gate)
    seen = fake.input()
    assert fake.config().queue == QUEUES.index("replay")
    assert seen.replay_digest[0] == table.plan_digests[0]
    lists = to_schedule(policy, table, layer.workers)[0]
    offsets = np.cumsum([0, *map(len, lists)])
    held = layer._natives[0]._lists
    found = [np.ctypeslib.as_array(c.cast(b.pointer, c.POINTER(c.c_uint32)), (b.num_bytes // 4,)) for b in held]
    assert found[0].tolist() == offsets.tolist()
    assert found[1].tolist() == [task for ids in lists for task in ids]
    assert [seen.replay_offset_device[0], seen.replay_ids_device[0]] == [b.pointer for b in held]
    assert [out.tobytes() for out in result.outputs] == [x[0].tobytes()]


def test_after_a_fault_the_layer_can_be_launched_again(fake):
    layer, x, resets = make(policy="ticket"), tokens(4), fake.count("resets")
    fake.fail_next()
    with pytest.raises(
        LaunchError, match=r"PE 0 worker 3, epoch 5: waited 2 s with task 7 for upped\[2\]: seen 10"
    ) as e:
        layer(x)
    assert e.value.fault["src"] is None and e.value.fault["tasks_run"] == [1] * 12
    assert fake.count("resets") == resets + 1
    assert layer(x).outputs[0].tobytes() == x[0].tobytes()
    fake.fail_next()
    layer.launch([16 * 1024], [16 * 1024], [0])  # asynchronous: nobody is told
    with pytest.raises(LaunchError):
        layer.check()
    layer.check()


# ---- tensors


class Tensor:
    """As much of a torch tensor on a card as is looked at, over numpy's memory."""

    def __init__(self, array, dtype="torch.bfloat16", is_cuda=True):
        self.array, self.dtype, self.is_cuda, self.device = array, dtype, is_cuda, "cuda:0" if is_cuda else "cpu"
        self.shape, self.ndim = array.shape, array.ndim

    def data_ptr(self):
        return self.array.ctypes.data

    def is_contiguous(self):
        return self.array.flags["C_CONTIGUOUS"]

    def stride(self):
        return tuple(step // 2 for step in self.array.strides)

    def new_empty(self, shape):
        return Tensor(aligned(np.zeros(shape, ml_dtypes.bfloat16)))

    def __len__(self):
        return len(self.array)


def aligned(array):
    """A copy at a multiple of 16 bytes."""
    space = np.empty(array.nbytes + 16, np.uint8)
    start = -space.ctypes.data % 16
    copy = space[start : start + array.nbytes].view(array.dtype).reshape(array.shape)
    copy[...] = array
    return copy


@pytest.fixture
def stream(monkeypatch):
    for module in ("device", "packed"):
        monkeypatch.setattr(f"flashmoe.hw.{module}.current_stream", lambda tensor: 99)


def test_tensors_are_used_where_they_are(fake, stream):
    layer = make(ep_size=2, policy="ticket")
    x = [Tensor(aligned(rows)) for rows in tokens(3, 1)]
    before = fake.count("mallocs")
    result = layer(x)
    assert fake.count("mallocs") == before
    assert list(fake.input().x_device[:2]) == [tensor.data_ptr() for tensor in x]
    assert list(fake.input().out_device[:2]) == [tensor.data_ptr() for tensor in result.outputs]
    assert fake.stream() == 99
    for ours, theirs in zip(result.outputs, x, strict=True):
        assert ours.array.tobytes() == theirs.array.tobytes()


def test_tensors_that_cannot_be_used(fake, stream):
    layer, rows = make(policy="ticket"), tokens(4)[0]
    for tensor, named in (
        (Tensor(rows, is_cuda=False), r"x\[0\] is on cpu"),
        (Tensor(rows, dtype="torch.float32"), r"x\[0\] is torch.float32 \(must be torch.bfloat16\)"),
        (Tensor(rows[:, :63]), r"x\[0\]: shape \(4, 63\) \(must be \(num_tokens, 64\)\)"),
        (Tensor(np.asfortranarray(rows)), r"x\[0\] has strides \(1, 4\)"),
    ):
        with pytest.raises(ValueError, match=named):
            layer([tensor])
    with pytest.raises(ValueError, match="tensors and arrays"):
        make(ep_size=2, policy="ticket")([Tensor(rows), rows])


def test_weights_are_packed_once_and_in_place(fake, stream):
    arrays = [aligned(array) for array in (WEIGHTS.gate, WEIGHTS.gate_up, WEIGHTS.down)]
    gc.collect()  # layers of other tests
    packs, buffers = fake.count("packs"), fake.count("buffers")
    packed = PackedWeights.in_place(MODEL, *map(Tensor, arrays))
    with pytest.raises(ValueError, match="queue push"):
        make(weights=packed, policy="push")
    assert arrays[1].tobytes() == WEIGHTS.gate_up.tobytes()  # not lost with a layer that cannot be made
    layers = [make(weights=packed), make(weights=packed, policy="ticket")]
    assert [array.view(np.uint16).flat[0] for array in arrays[1:]] == [0x0101, 0x0202]
    for layer in layers:
        layer(tokens(2))
    assert fake.count("packs") == packs + 1
    assert fake.count("buffers") == buffers
    assert packed.gate().tobytes() == WEIGHTS.gate.tobytes()
    other = fm.MoEModel(**{**MODEL.to_dict(), "name": "other"})
    with pytest.raises(ValueError, match="packed for"):
        DeviceLayer(other, packed, ep_size=1, max_tokens=4)


# ---- the command line


def command(*arguments, status):
    result = CliRunner().invoke(app, ["run", "--model", "fake", *arguments])
    assert result.exit_code == status, result.output
    return result


@pytest.fixture
def preset(monkeypatch):
    sizes = {name: getattr(MODEL, name) for name in ("d_model", "d_ff", "num_experts", "top_k")}
    monkeypatch.setitem(MODEL_PRESETS, "fake", sizes)


def test_flashmoe_run_on_a_card(fake, preset, tmp_path):
    """With defaults: one PE, all workers, tuned. The fake's copy of x is a wrong result, and is told as one."""
    out = tmp_path / "t.npz"
    result = command("--backend", "cuda", "--tokens", "9", "--out", str(out), "--json", status=1)
    inputs = json.loads(result.stdout)["inputs"]
    assert (inputs["backend"], inputs["pes"], inputs["workers"], inputs["policy"]) == ("cuda", 1, 12, "tuned")
    assert inputs["tiling"] == tuned(9).tiling.to_dict()
    assert "relative error" in result.stderr
    header = fm.Trace.load(out).header
    assert (header["num_workers"], header["drops"], header["num_tokens"]) == (12, 12, [9])


def test_flashmoe_run_takes_pes_workers_and_tilings(fake, preset):
    options = ["--pes", "4", "--workers", "2", "--policy", "ticket", "--down", "rows", "--routing", "zipf:1"]
    inputs = json.loads(command("--backend", "cuda", *options, "--json", status=1).stdout)["inputs"]
    assert (inputs["pes"], inputs["workers"], inputs["down"], inputs["routing"]) == (4, 2, "rows", "zipf:1")
    assert all(fake.input().topk_idx_device[:4])
    assert fake.config().num_pes == 4


def test_flashmoe_run_says_what_a_card_cannot_do(fake, preset, monkeypatch):
    for options, status, named in (
        (["--policy", "push"], 2, "queue push"),
        (["--tokens", "1025"], 2, "1025"),
        (["--dtype", "f32"], 2, "dtype='f32'"),
        (["--workers", "13"], 2, "12 CUs"),
    ):
        assert named in command("--backend", "cuda", *options, status=status).stderr
    library.load_library.cache_clear()
    monkeypatch.setattr(library, "check_driver", driver.check_driver)
    monkeypatch.setitem(driver._DRIVERS, "cuda", (("libnone.so.1",), "", "", Path()))
    assert "error: no GPU for backend='cuda'" in command("--backend", "cuda", status=1).stderr


# ---- what cannot be done


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"policy": "push"}, r"create: queue push \(the fake kernel does not\)"),
        ({"workers": 13}, r"workers=13 .*Fake H200 has 12 CUs"),
        ({"workers": 4, "ep_size": 4}, r"workers=4 on 4 PEs .*0\.\.3"),
        ({"max_tokens": 1025}, r"max_tokens=1025 \(accepted: 0\.\.1024\)"),
        ({"ep_size": 3}, "must divide num_experts=8"),
        ({"ep_size": 16}, r"ep_size=16 \(accepted: 1\.\.8\)"),
        ({"deadline_s": 0}, "deadline_s=0"),
        ({"kernel": "fast"}, "best, general, pipeline"),
        ({"policy": "fifo"}, "policy='fifo'"),
    ],
)
def test_refused_with_the_reason(fake, options, named):
    with pytest.raises(ValueError, match=named):
        make(**options)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"dtype": "f32"}, "dtype='f32'"),
        ({"d_model": 96}, "d_model=96"),
        ({"d_ff": 8256}, "d_ff=8256"),
        ({"num_experts": 513}, "num_experts=513"),
        ({"num_experts": 32, "top_k": 17}, "top_k=17"),
    ],
)
def test_shapes_that_no_kernel_can_do(changes, named):
    model = fm.MoEModel(**{**MODEL.to_dict(), **changes})
    with pytest.raises(ValueError, match=named):
        fm.run(model, WEIGHTS, tokens(1), backend="cuda")


def test_libraries_that_are_not_for_this(monkeypatch, fake_path, tmp_path):
    other = fm.MoEModel(**{**MODEL.to_dict(), "top_k": 3})
    use(monkeypatch, fake_path)
    with pytest.raises(BuildError, match=r"built for top_k=2 \(wanted 3\)"):
        library.load_library(other, "cuda")
    (tmp_path / "text.so").write_text("not a library")
    use(monkeypatch, tmp_path / "text.so")
    with pytest.raises(BuildError, match="cannot load"):
        library.load_library(MODEL, "cuda")
    header = (source_folder() / "device" / "api.h").read_text()
    (tmp_path / "api.h").write_text(header.replace(f"FLASHMOE_ABI {library.ABI}", "FLASHMOE_ABI 99"))
    use(monkeypatch, compile_fake(tmp_path, "-iquote", str(tmp_path)))
    with pytest.raises(BuildError, match="version 99 of the interface"):
        library.load_library(MODEL, "cuda")
    library.load_library.cache_clear()


def test_another_card_is_named(monkeypatch, tmp_path):
    use(monkeypatch, compile_fake(tmp_path, '-DARCH="sm_80"'))
    with pytest.raises(DeviceError, match=r"Fake H200 \(sm_80\); backend='cuda' is for sm_90 \(H100"):
        make()
    use(monkeypatch, compile_fake(tmp_path, '-DARCH="gfx942:sramecc+:xnack-"'))
    result = make(backend="hip", policy="ticket")(tokens(1))
    assert result.trace.header["executor"] == "hip"
    library.load_library.cache_clear()


def test_no_driver_and_no_device(monkeypatch, tmp_path):
    (tmp_path / "driver.c").write_text(
        "int fakeInit(unsigned flags) { return (int)flags; }\nint fakeCount(int* n) { *n = 0; return 0; }\n"
    )
    made = compile_c(tmp_path / "driver.c", tmp_path / "driver.so", "-shared", "-fPIC")
    version = tmp_path / "version"
    for names, named in ((("libnone.so.1",), "libnone.so.1 is not there"), ((str(made),), r"finds none \(status 0\)")):
        monkeypatch.setitem(driver._DRIVERS, "cuda", (names, "fakeInit", "fakeCount", version))
        with pytest.raises(DeviceError, match=named):
            fm.run(MODEL, WEIGHTS, tokens(1), backend="cuda")
    assert driver.driver_version("cuda") is None
    version.write_text("version 580.1\nmore\n")
    assert driver.driver_version("cuda") == "version 580.1"
