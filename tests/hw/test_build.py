"""Device libraries: compilers found and refused, what the cache keeps. Compilers here are little scripts."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner

from flashmoe import MoEModel, _native
from flashmoe.cli import app, screen
from flashmoe.hw import build, compilers
from flashmoe.hw.build import build_library, log_of
from flashmoe.hw.compilers import BuildError, find_compiler

TINY = MoEModel(d_model=64, d_ff=64, num_experts=4, top_k=2)
NVCC = "Cuda compilation tools, release 13.0, V13.0.88"
CLANG = "Debian clang version 19.1.7 (3~deb12u1)"

# appends its arguments to a file, then makes what -o names: some ELF file serves as an object and as a library
SCRIPT = """#!/bin/sh
case $1 in
  --version) echo '{version}'; exit;;
  -print-prog-name=*) echo "{programs}/${{1#*=}}"; exit;;
esac
echo "$@" >> {calls}
while [ $# -gt 1 ]; do [ "$1" = -o ] && made=$2; shift; done
{body}
"""


class Bench:
    """A PATH of scripts, an empty cache, and the sources in a folder of their own."""

    def __init__(self, folder: Path) -> None:
        self.bin, self.cache, self.sources, self.calls = (
            folder / name for name in ("bin", "cache", "sources", "calls.txt")
        )
        for file in ("include/a.hpp", "kernel/b.hpp", "device/c.cu", "device/d.hip"):
            (self.sources / file).parent.mkdir(parents=True, exist_ok=True)
            (self.sources / file).write_text(file)
        self.bin.mkdir()

    def compiler(
        self, name: str, version: str, body: str = f"/bin/cp {_native.__file__} $made", programs: str = "/lib"
    ):
        script = self.bin / name
        script.write_text(SCRIPT.format(version=version, body=body, calls=self.calls, programs=programs))
        script.chmod(0o755)

    def called(self) -> list[str]:
        return self.calls.read_text().splitlines() if self.calls.exists() else []


@pytest.fixture
def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Bench:
    """g++ alone, and Debian's HIP packages as far as they are files."""
    bench = Bench(tmp_path)
    bench.compiler("g++", "g++ 12")
    monkeypatch.setenv("PATH", str(bench.bin))
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "cuda"))
    monkeypatch.setenv("ROCM_PATH", str(tmp_path / "rocm"))
    monkeypatch.setenv("FLASHMOE_CACHE", str(bench.cache))
    monkeypatch.setattr(build, "source_folder", lambda: bench.sources)
    header, bitcode = tmp_path / "hip_runtime.h", tmp_path / "bitcode"
    header.touch()
    bitcode.mkdir()
    for name in ("ocml.bc", "oclc_isa_version_940.bc"):
        (bitcode / name).write_text(name)
    monkeypatch.setattr(compilers, "_HIP_HEADER", header)
    monkeypatch.setattr(compilers, "_DEVICE_LIBRARIES", bitcode)
    return bench


# ---- which compiler


def test_an_unknown_target_is_refused() -> None:
    with pytest.raises(ValueError, match=r"target='sm_80' \(accepted: sm_90, gfx942\)"):
        build_library(TINY, "sm_80")


@pytest.mark.parametrize(
    "change, message",
    [
        ({"d_model": 100}, r"d_model=100 .*multiples of 64 in 64\.\.8192"),
        ({"d_ff": 8256}, "d_ff=8256"),
        ({"num_experts": 513}, r"num_experts=513 .*1\.\.512"),
        ({"num_experts": 32, "top_k": 17}, r"top_k=17 .*1\.\.16"),
        ({"dtype": "f32"}, "dtype='f32'"),
    ],
)
def test_a_shape_that_no_kernel_does_is_refused_before_a_compiler_is_looked_for(bench, change, message) -> None:
    with pytest.raises(ValueError, match=message):
        build_library(replace(TINY, **change), "sm_90")


@pytest.mark.parametrize(
    "said, message",
    [
        (None, r"nvcc is not in PATH.*install the CUDA toolkit, 12\.4 or later"),
        ("release 12.3, V12.3.107", r"nvcc is version 12\.3 \(install the CUDA toolkit, 12\.4 or later\)"),
        ("out of licences", "nvcc --version does not tell its version: out of licences"),
    ],
)
def test_an_unfit_nvcc_says_what_to_install(bench, said, message) -> None:
    if said is not None:
        bench.compiler("nvcc", said)
    with pytest.raises(BuildError, match=message):
        find_compiler("sm_90")


def test_nvcc_needs_a_host_compiler(bench) -> None:
    bench.compiler("nvcc", NVCC)
    (bench.bin / "g++").unlink()
    with pytest.raises(BuildError, match=r"g\+\+ is not in PATH \(install g\+\+\)"):
        find_compiler("sm_90")


def test_a_compiler_outside_path_is_found_where_its_variable_points(bench, tmp_path) -> None:
    (tmp_path / "cuda" / "bin").mkdir(parents=True)
    bench.compiler("nvcc", "release 12.4, V12.4.1")
    (bench.bin / "nvcc").rename(tmp_path / "cuda" / "bin" / "nvcc")
    assert find_compiler("sm_90").name == "nvcc 12.4"


def test_no_compiler_for_gfx942_says_what_to_install(bench) -> None:
    with pytest.raises(BuildError, match=r"neither hipcc nor clang\+\+-19 .*ROCm, 6\.0 or later, or Debian's clang-19"):
        find_compiler("gfx942")


def test_hipcc_goes_before_clang_unless_it_is_too_old(bench) -> None:
    bench.compiler("hipcc", "HIP version: 5.2.21153-0")
    with pytest.raises(BuildError, match=r"hipcc is version 5\.2, and there is no clang\+\+-19 .*ROCm, 6\.0 or later"):
        find_compiler("gfx942")
    bench.compiler("clang++-19", CLANG)
    assert find_compiler("gfx942").name == "clang++-19 19.1.7"
    bench.compiler("hipcc", "HIP version: 6.2.41133-dd7f95766")
    assert find_compiler("gfx942").name == "hipcc 6.2"


def test_clang_names_the_packages_it_lacks(bench, tmp_path) -> None:
    bench.compiler("clang++-19", CLANG, programs="")  # answers /lld: there
    (tmp_path / "bitcode" / "ocml.bc").unlink()
    with pytest.raises(BuildError, match=r"\(install rocm-device-libs\)"):
        find_compiler("gfx942")
    (tmp_path / "hip_runtime.h").unlink()
    (bench.bin / "clang++-19").write_text(f"#!/bin/sh\n[ $1 = --version ] && echo '{CLANG}' || echo ${{1#*=}}\n")
    with pytest.raises(BuildError, match=r"\(install lld-19 clang-tools-19 libamdhip64-dev rocm-device-libs\)"):
        find_compiler("gfx942")


# ---- the cache


def test_a_library_is_compiled_once(bench) -> None:
    bench.compiler("nvcc", NVCC)
    lines: list[str] = []
    first = build_library(TINY, "sm_90", progress=lines.append)
    assert lines == ["compiling d_model 64, d_ff 64, 4 experts, top 2 for sm_90 with nvcc 13.0"]
    assert [sum(name in call for call in bench.called()) for name in ("c.cu", "d.hip", "-shared")] == [1, 1, 1]
    assert build_library(TINY, "sm_90", progress=lines.append) == first
    assert len(bench.called()) == 3 and len(lines) == 1
    assert sorted(bench.cache.iterdir()) == [log_of(first), first]


def test_the_shape_is_built_in(bench) -> None:
    bench.compiler("nvcc", NVCC)
    build_library(MoEModel(d_model=128, d_ff=192, num_experts=5, top_k=3, norm_topk_prob=False), "sm_90")
    defined = {flag for flag in bench.called()[0].split() if flag.startswith("-D")}
    sizes = {"D_MODEL": 128, "D_FF": 192, "NUM_EXPERTS": 5, "TOP_K": 3, "NORM_TOPK": 0}
    assert defined == {f"-DFLASHMOE_{name}={size}" for name, size in sizes.items()}


def test_sources_compiler_and_shape_each_make_another_library(bench) -> None:
    bench.compiler("nvcc", NVCC)
    libraries = {build_library(TINY, "sm_90"), build_library(replace(TINY, top_k=1), "sm_90")}
    (bench.sources / "include" / "a.hpp").write_text("changed")
    libraries.add(build_library(TINY, "sm_90"))
    bench.compiler("nvcc", NVCC.replace("13.0", "13.1"))
    libraries.add(build_library(TINY, "sm_90"))
    assert len(libraries) == 4


@pytest.mark.parametrize("size", [0, 40, 64, -1])
def test_half_a_file_is_made_anew(bench, size) -> None:
    bench.compiler("nvcc", NVCC)
    library = build_library(TINY, "sm_90")
    whole = library.read_bytes()
    library.write_bytes(whole[:size])
    assert build_library(TINY, "sm_90") == library
    assert library.read_bytes() == whole and len(bench.called()) == 6


def test_a_compiler_that_fails_leaves_its_last_words_and_no_file(bench) -> None:
    bench.compiler("nvcc", NVCC, body="echo 'c.cu(7): error: no such thing' >&2; exit 3")
    with pytest.raises(BuildError, match=r"nvcc failed with status 3:\nc\.cu\(7\): error: no such thing"):
        build_library(TINY, "sm_90")
    assert list(bench.cache.iterdir()) == []


def test_a_cache_that_cannot_be_written_names_the_variable(bench, tmp_path, monkeypatch) -> None:
    bench.compiler("nvcc", NVCC)
    (tmp_path / "a_file").touch()
    monkeypatch.setenv("FLASHMOE_CACHE", str(tmp_path / "a_file" / "cache"))
    with pytest.raises(BuildError, match=r"cannot write .*a_file.*: Not a directory \(FLASHMOE_CACHE names another"):
        build_library(TINY, "sm_90")


def test_builders_at_once_get_one_whole_library(bench) -> None:
    bench.compiler("nvcc", NVCC, body=f"/bin/sleep 0.1; /bin/cp {_native.__file__} $made")
    with ThreadPoolExecutor() as pool:
        libraries = set(pool.map(lambda _: build_library(TINY, "sm_90"), range(4)))
    assert len(libraries) == 1
    (library,) = libraries
    assert library.read_bytes() == Path(_native.__file__).read_bytes()
    assert sorted(bench.cache.iterdir()) == [log_of(library), library]


def test_clang_gets_the_bitcode_that_debian_lacks(bench) -> None:
    bench.compiler(
        "clang++-19",
        CLANG,
        body=f"""case $made in *.so) ;; *) /bin/ls {bench.cache}/*/bitcode >> {bench.calls};; esac
/bin/cp {_native.__file__} $made""",
    )
    assert build_library(TINY, "gfx942").suffix == ".so"
    compiled, *bitcode, linked = bench.called()
    assert "d.hip" in compiled and "--offload-arch=gfx942" in compiled
    assert bitcode == ["oclc_isa_version_940.bc", "oclc_isa_version_942.bc", "ocml.bc"]
    assert "-lamdhip64" in linked


# ---- the command


def call(*arguments: str, status: int = 0):
    result = CliRunner().invoke(app, ["build", *arguments])
    assert result.exit_code == status, result.output
    return result


def test_the_command_says_where_the_library_is(bench) -> None:
    bench.compiler("nvcc", NVCC)
    result = call("--d-model", "64", "--d-ff", "64", "--experts", "4", "--top-k", "2", "--json")
    assert result.stderr == "compiling d_model 64, d_ff 64, 4 experts, top 2 for sm_90 with nvcc 13.0\n"
    (library,) = json.loads(result.stdout)["libraries"]
    assert library["library"] == str(build_library(TINY, "sm_90"))
    assert library["bytes"] == Path(_native.__file__).stat().st_size
    assert (library["compiler"], library["compiled"]) == ("nvcc 13.0", True)
    again = call("--d-model", "64", "--d-ff", "64", "--experts", "4", "--top-k", "2")
    assert "in the cache" in again.stdout and library["library"] in again.stdout and again.stderr == ""


def test_exit_status(bench) -> None:
    assert "install the CUDA toolkit" in call(status=1).stderr
    assert "accepted: sm_90, gfx942" in call("--target", "sm_80", status=2).stderr
    assert "top_k=5" in call("--experts", "4", "--top-k", "5", status=2).stderr
    assert "unknown suffix" in call("--report", "page.txt", status=2).stderr


def test_doctor_says_what_to_install(bench, monkeypatch) -> None:
    monkeypatch.setattr(screen.out, "width", 1000)  # no line is broken
    text = CliRunner().invoke(app, ["doctor"]).output
    assert "nvcc is not in PATH" in text and "neither hipcc nor clang++-19" in text and str(bench.cache) in text
