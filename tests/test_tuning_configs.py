"""Configurations: the one asked for, else the one measured, else the implementation's own choice; what is an error."""

import functools
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jaxzip.ffi import cuda_backend, cuda_configs
from jaxzip.ffi.libraries import cuda_available
from jaxzip.pallas_kernels import backend as pallas_backend
from jaxzip.pallas_kernels import mosaic_lanes

import jaxzip
from jaxzip import tuning
from jaxzip.compress import encode_as
from jaxzip.formats import auto
from jaxzip.formats import lane_planar as layout
from jaxzip.ops import measured, registry
from jaxzip.testing import gaussian_weights

K, M = 259, 323
GPU = "a GPU"
ASKED, RECORDED = "wgmma 4/2 C1 cl3", "direct t4 w16x1 C2 cl6"
needs_mosaic = pytest.mark.skipif(bool(mosaic_lanes.unavailable_reason()), reason=mosaic_lanes.unavailable_reason())
needs_library = pytest.mark.skipif(not cuda_available(), reason=cuda_available().reason)


@pytest.fixture(autouse=True)
def own_table(tmp_path, monkeypatch):
    monkeypatch.setenv(measured.DIRECTORY, str(tmp_path / "cache"))
    monkeypatch.delenv(measured.SWITCH, raising=False)
    measured.forget()  # programs of another test's table have the same number else


@pytest.fixture
def for_cuda(monkeypatch):
    """Programs for a GPU that is not here: the CUDA implementations, whether their library was built or not."""
    registry.load_backends()
    without = {op: [i for i in known if i.platforms != ("cuda",)] for op, known in registry._registry.items()}
    monkeypatch.setattr(registry, "_registry", without)
    monkeypatch.setattr(registry, "_missing", {})
    monkeypatch.setattr(auto, "_preferences", [])
    monkeypatch.setattr(cuda_backend, "register_cuda", lambda: None)
    monkeypatch.setattr(measured, "device_kind", lambda platform: GPU if platform == "cuda" else None)
    cuda_backend.register_cuda_backend()
    pallas_backend.register_cuda()
    jax.clear_caches()
    yield
    jax.clear_caches()


def encoded(format):
    w = gaussian_weights((K, M))
    if format == "raw":
        return jaxzip.compress(w, format="raw")
    return jax.tree.map(jnp.asarray, encode_as(w, format, -1))


def record(rows, times, configs=None):
    measured.record(GPU, "lane-planar", M, K, rows, times, configs)


def config_of(z, rows, *, transform=lambda f: f, dtype=jnp.bfloat16, **options):
    """The attributes of the kernel that a program lowered for a GPU calls: configuration, and whether it must fit."""
    f = transform(lambda x, z: jaxzip.matmul(x, z, implementation="ffi", **options))
    text = jax.jit(f).trace(jnp.ones((rows, K), dtype), z).lower(lowering_platforms=("cuda",)).as_text()
    calls = [line for line in text.splitlines() if "custom_call @jaxzip_lane_planar_gemm" in line]
    (found,) = {
        (re.search(r'(?<!_)config = "(.*?)"', c)[1], re.search(r"config_asked_for = (\w+)", c)[1]) for c in calls
    }
    return found


@pytest.mark.parametrize("format", ["lane-planar", "raw"])
def test_asked_for_then_measured_then_chosen_by_the_kernel(for_cuda, format):
    """Also of the raw control, which must add in the order of what it controls."""
    z = encoded(format)
    assert config_of(z, 8) == ("", "false")
    record(8, {"ffi": 1.0}, {"ffi": RECORDED})
    assert config_of(z, 8) == config_of(z, 5) == (RECORDED, "false")
    assert config_of(z, 9) == config_of(z, 4) == ("", "false")  # other powers of two
    assert config_of(z, 8, config=ASKED) == config_of(z, 9, config=ASKED) == (ASKED, "true")
    assert config_of(z, 8, batch_invariant=True) == ("", "false")
    with tuning.disabled():
        assert config_of(z, 8) == ("", "false")
        assert config_of(z, 8, config=ASKED) == (ASKED, "true")
    record(8, {"ffi": 2.0})  # its own choice was the fastest this time
    assert config_of(z, 8) == ("", "false")


def test_gradients_go_through_a_product_in_a_configuration(for_cuda):
    loss = lambda f: jax.value_and_grad(lambda x, z: f(x, z).astype(jnp.float32).sum())  # noqa: E731
    assert config_of(encoded("lane-planar"), 3, transform=loss, config=ASKED) == (ASKED, "true")


def test_the_fastest_configuration_decides_between_implementations(for_cuda):
    z, x = encoded("lane-planar"), jnp.ones((8, K), jnp.bfloat16)
    lowered = lambda: jax.jit(jaxzip.matmul).trace(x, z).lower(lowering_platforms=("cuda",)).as_text()  # noqa: E731
    record(8, {"ffi": 3.0, "decompress": 2.0})
    assert "jaxzip_lane_planar_gemm" not in lowered() and "jaxzip_lane_planar_decompress" in lowered()
    record(8, {"ffi": 1.5, "decompress": 2.0}, {"ffi": RECORDED})
    jax.clear_caches()
    assert f' config = "{RECORDED}"' in lowered()


@needs_mosaic
def test_pallas_configurations(for_cuda, monkeypatch):
    from jaxzip.pallas_kernels import lane_planar_matmul, matmul_configs

    run, kernel = [], lane_planar_matmul.matmul
    monkeypatch.setattr(
        lane_planar_matmul, "matmul", lambda *a, config, **k: run.append(config) or kernel(*a, config=config, **k)
    )
    z, x = encoded("lane-planar"), jax.ShapeDtypeStruct((8, K), jnp.bfloat16)

    def runs(config=None):
        f = lambda x, z: jaxzip.matmul(x, z, implementation="pallas", config=config)  # noqa: E731
        text = jax.jit(f).trace(x, z).lower(lowering_platforms=("cuda",)).as_text()
        assert text.count("custom_call @mosaic_gpu") == 1
        return run.pop()

    listed = registry.configurations(
        "matmul", "pallas", "cuda", x, z, None, None, out_dtype=jnp.dtype(jnp.bfloat16), batch_invariant=False
    )
    assert len(listed) > 2 and runs().name == listed[0]
    assert runs(listed[1]).name == listed[1]
    record(8, {"pallas": 1.0}, {"pallas": listed[2]})
    assert runs().name == listed[2] and runs(listed[1]).name == listed[1]
    record(8, {"pallas": 1.0}, {"pallas": "of another version"})
    assert runs() == matmul_configs.choose(8, M, K, z.payload["blocks"].shape[2])
    with pytest.raises(ValueError, match=rf"no configuration \"r9\" for x \[8, {K}\].*{M} outputs.*{listed[0]}"):
        runs("r9")


@needs_mosaic
def test_names_of_pallas_configurations_are_unambiguous():
    from jaxzip.pallas_kernels import matmul_configs

    for m, k in ((1024, 4096), (4096, 14336), (128256, 4096), (77, 8200), (65, 63), (1, 1)):
        for n in (1, 8, 33, 64, 128, 129, 256):
            problem = (n, m, k, layout.WIDTHS[-1])
            best = matmul_configs.best(*problem)
            assert best[0] == matmul_configs.choose(*problem) and 1 <= len(best) <= matmul_configs.MOST
            assert len({config.name for config in best}) == len(best)
            assert [matmul_configs.find(config.name, *problem) for config in best] == best
    assert matmul_configs.find("r4k1 C1", 256, 4096, 4096, layout.WIDTHS[-1]) is None


def test_what_has_no_configurations(for_cuda):
    z, x = encoded("lane-planar"), jnp.ones((2, K), jnp.bfloat16)
    with pytest.raises(ValueError, match='name it as well, such as implementation="ffi"'):
        jaxzip.matmul(x, z, config=ASKED)
    for name in ("xla", "decompress"):
        with pytest.raises(NotImplementedError, match="XLA's dot has no configurations"):
            jaxzip.matmul(x, z, implementation=name, config=ASKED)
    with pytest.raises(NotImplementedError, match="XLA's dot has no configurations"):
        jaxzip.matmul(x, jnp.ones((K, M), jnp.bfloat16), implementation="xla", config=ASKED)
    with pytest.raises(NotImplementedError, match="TCA-TBE kernel has no configurations.*wgmma 4/2"):
        jaxzip.matmul(x, encoded("tca-tbe"), implementation="ffi", config=ASKED)
    with pytest.raises(ValueError, match="empty string|misspelt"):
        jaxzip.matmul(x, z, implementation="ffi", config="")
    with pytest.raises(Exception, match="the CPU kernel has no configurations"):  # when it runs, if a GPU's is there
        jax.block_until_ready(jaxzip.matmul(x, z, implementation="ffi", config=ASKED))


@needs_library
def test_the_library_knows_configurations_without_a_gpu():
    for m, k in ((6144, 4096), (1024, 4096), (34816, 5120), (65, 8200), (1, 1)):
        for n in (1, 8, 16, 17, 64, 128, 256):
            listed = cuda_configs.configurations(n, m, k)
            assert 1 <= len(listed) == len(set(listed)) <= cuda_configs.MOST
            for config in listed:
                for raw in (False, True):
                    assert cuda_configs.problem(config, n, m, k, batch_invariant=False, raw=raw) == ""
    assert any(c.startswith("direct") for c in listed_for(8)) and any(c.startswith("wgmma 4/") for c in listed_for(8))
    assert all(c.startswith("wgmma 2/") for c in listed_for(256))
    assert cuda_configs.configurations(257, M, K) == ()


@needs_library
def test_configurations_of_two_launches():
    """34816 outputs are 544 row blocks, 16 more than 132 CTAs with four teams take at once."""
    rows, m, k = 64, 34816, 5120
    problem = functools.partial(cuda_configs.problem, rows=rows, m=m, k=k, batch_invariant=False, raw=False)
    assert cuda_configs.configurations(rows, m, k)[0].startswith("wgmma 4/1 C1 cl132 + 16 wgmma 4/")
    assert problem("wgmma 4/1 C1 cl132 + 16 wgmma 4/4 C4 cl16") == ""
    for too_many in (-1, 544, 545, 99999999):
        assert "does not fit" in problem(f"wgmma 4/1 C1 cl132 + {too_many} wgmma 4/4 C4 cl16")
    for wrong in (
        "+ 0 wgmma 4/4 C4 cl16",
        "+ 16",
        "+ 16 wgmma 2/1 C1 cl16",
        "+ 16 direct t4 w8x1 C1 cl1",
    ):
        assert "misspelt" in problem(f"wgmma 4/1 C1 cl132 {wrong}")


def listed_for(rows):
    return cuda_configs.configurations(rows, 6144, 4096)


@needs_library
def test_a_configuration_that_does_not_fit_is_refused_in_the_trace(for_cuda):
    z, x = encoded("lane-planar"), jnp.ones((8, K), jnp.bfloat16)

    def refused(config, match, **options):
        with pytest.raises(ValueError, match=match) as caught:
            config_of(z, len(x), config=config, **options)
        assert config in str(caught.value) and f"[8, {K}]" in str(caught.value) and str(M) in str(caught.value)

    refused("wgmma 4/2 C9 cl1", "does not fit")
    refused("wgmma 2/1 C1 cl1", 'for another number of rows; give one like "')
    refused("wgmma 4/2 C1 cl3 ", "misspelt")
    refused(ASKED, "not the batch invariant one", batch_invariant=True)
    only = re.search(r'is "(wgmma .*?)": give', cuda_configs.problem(ASKED, 8, M, K, batch_invariant=True, raw=False))[
        1
    ]
    assert config_of(z, 8, config=only, batch_invariant=True) == (only, "true")


def test_without_the_library_no_configuration_is_listed(monkeypatch):
    def missing():
        raise ImportError("not built")

    monkeypatch.setattr(cuda_configs, "cuda_library", missing)
    cuda_configs.configurations.cache_clear()
    assert cuda_configs.configurations(8, M, K) == ()
    cuda_configs.configurations.cache_clear()
    assert cuda_configs.problem("anything", 8, M, K, batch_invariant=False, raw=False) == ""


def write_table(content):
    path = tuning.cache_file()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))
    measured._user_layer_of.cache_clear()


def test_tables_without_configurations_stay_readable():
    name = measured.key("lane-planar", M, K, 4)
    write_table({"version": 1, "devices": {GPU: {name: {"ffi": 2.0, "pallas": 1.5}}}})
    assert measured.times(GPU, "lane-planar", M, K, 4) == {"ffi": 2.0, "pallas": 1.5}
    assert measured.config(GPU, "lane-planar", M, K, 4, "ffi") is None
    measured.record(GPU, "lane-planar", M, K, 8, {"ffi": 1.25, "decompress": 3.0}, {"ffi": RECORDED})
    assert measured.times(GPU, "lane-planar", M, K, 4) == {"ffi": 2.0, "pallas": 1.5}
    assert measured.times(GPU, "lane-planar", M, K, 8) == {"ffi": 1.25, "decompress": 3.0}
    assert measured.config(GPU, "lane-planar", M, K, 7, "ffi") == RECORDED
    for other in ("decompress", "gone"):
        assert measured.config(GPU, "lane-planar", M, K, 8, other) is None
    assert measured.config(GPU, "lane-planar", M, K, 16, "ffi") is None
    assert measured.config("another GPU", "lane-planar", M, K, 8, "ffi") is None
    with tuning.disabled():
        assert measured.config(GPU, "lane-planar", M, K, 8, "ffi") is None


@pytest.mark.parametrize("entry", [{"us": 0.0, "config": "a"}, {"config": "a"}, {"us": 1.0, "config": 2}, "fast"])
def test_a_table_with_a_bad_entry_is_ignored_with_a_warning(entry):
    write_table({"version": 2, "devices": {GPU: {measured.key("lane-planar", M, K, 4): {"ffi": entry}}}})
    with pytest.warns(RuntimeWarning, match="tuning.json"):
        assert measured.times(GPU, "lane-planar", M, K, 4) is None


class FakeTimer:
    """Microseconds by implementation and configuration, once for each time that they are asked for."""

    times: dict = {}

    def __init__(self, name, config, x, weights, platform):
        if (name, config) not in self.times:
            raise NotImplementedError("does not compile")
        self._times = iter(self.times[name, config])

    def __call__(self, repeats):
        return next(self._times)


@pytest.fixture
def timed(monkeypatch):
    """Runs ``tune`` with these times in place of measured ones, for implementations that list a, b and c."""
    monkeypatch.setattr(tuning, "_Timer", FakeTimer)
    monkeypatch.setattr(tuning, "candidates", lambda *_: list(dict.fromkeys(name for name, _ in FakeTimer.times)))
    monkeypatch.setattr(registry, "configurations", lambda *_, **__: ("a", "b", "c"))

    def run(times):
        monkeypatch.setattr(FakeTimer, "times", times)
        z = encoded("lane-planar")
        (found,) = tuning.tune(z, (8,), cold_bytes=1)
        kind = measured.device_kind("cpu")
        recorded = {name: measured.config(kind, "lane-planar", M, K, 8, name) for name in found.us}
        assert {name: c for name, c in recorded.items() if c} == found.configs
        assert measured.times(kind, "lane-planar", M, K, 8) == found.us
        return found

    return run


def test_tune_records_the_configuration_that_is_fastest_twice(timed):
    found = timed({("ffi", None): [10, 10], ("ffi", "b"): [9], ("ffi", "c"): [8, 8.5]})
    assert found.us == {"ffi": 8.5} and found.configs == {"ffi": "c"}


@pytest.mark.parametrize("again", [(10, 9.95), (8, 8.5)], ids=["no gain", "clocks drifted"])
def test_tune_leaves_the_choice_to_the_kernel_where_nothing_is_gained(timed, again):
    own, other = again
    found = timed({("ffi", None): [10, own], ("ffi", "b"): [8, other], ("ffi", "c"): [9]})
    assert found.us == {"ffi": 10} and found.configs == {}


def test_tune_tries_no_configurations_of_what_is_far_behind(timed):
    slow = 10 * tuning.HOPELESS + 1
    found = timed({("ffi", None): [10, 10], ("ffi", "b"): [9, 9], ("ffi", "c"): [11], ("pallas", None): [slow]})
    assert found.us == {"ffi": 9, "pallas": slow} and found.configs == {"ffi": "b"}
    assert found.fastest == "ffi"


def test_tune_times_rivals_in_turns(timed):
    """The first times of two implementations are some way apart in time, and so are their clocks."""
    others = {(name, config): [11] for name in ("ffi", "pallas") for config in "bc"}
    found = timed(others | {("ffi", None): [10, 9, 12, 9.5], ("pallas", None): [9.6, 10, 9, 11]})
    assert found.us == {"ffi": 9.5, "pallas": 10} and found.fastest == "ffi"


def test_tune_times_a_rival_in_its_best_configuration(timed):
    others = {("ffi", "c"): [11], ("pallas", "b"): [11], ("pallas", "c"): [11]}
    found = timed(others | {("ffi", None): [10, 10], ("ffi", "b"): [9, 9, 8, 8, 8], ("pallas", None): [10, 9, 9, 9]})
    assert found.us == {"ffi": 8, "pallas": 9} and found.configs == {"ffi": "b"}


def test_tune_passes_over_a_configuration_that_does_not_run(timed):
    with pytest.warns(RuntimeWarning, match=r"ffi lists the configuration 'b' .* does not run .*does not compile"):
        found = timed({("ffi", None): [10, 10], ("ffi", "c"): [9, 9]})
    assert found.configs == {"ffi": "c"}


def test_configurations_for_a_user(monkeypatch):
    z = encoded("lane-planar")
    assert tuning.configurations(z, 8) == {}  # nothing on a CPU has any
    monkeypatch.setattr(registry, "configurations", lambda op, name, *_, **__: ("a", "b") if name == "ffi" else ())
    assert tuning.configurations(z, 8) == {"ffi": ("a", "b")}
    with pytest.raises(TypeError, match="CompressedTensor"):
        tuning.configurations(np.ones((3, 4)), 8)


def test_the_command_shows_configurations(monkeypatch, capsys):
    from jaxzip.cli import tune as command

    def measurements(*configs):
        return lambda w, rows, **_: [
            tuning.Measurement(GPU, w.format, M, K, n, {"ffi": 8.5, "pallas": 9.0}, c) for n, c in zip(rows, configs)
        ]

    def shown(*configs):
        monkeypatch.setattr(tuning, "tune", measurements(*configs))
        command.tune_command("anywhere", rows="1,8", repeats=1, as_json=False)
        return capsys.readouterr().out

    monkeypatch.setattr(command, "distinct_weights", lambda _: [encoded("lane-planar")])
    monkeypatch.setenv("COLUMNS", "120")
    found = shown({"ffi": RECORDED}, {})
    assert RECORDED in found and "its own choice" in found
    assert "configuration" not in shown({"pallas": "r1k4 C1"}, {})  # what runs is ffi
