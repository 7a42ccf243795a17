"""Test session set-up: several virtual CPU devices for sharding tests, and GPU tests skipped without a GPU."""

import functools
import os

# Before any test initialises a JAX backend. Workers of pytest-xdist share a GPU: none may take its memory for itself.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=4"

import pytest  # noqa: E402


@functools.cache
def _has_gpu() -> bool:
    import jax

    try:
        return bool(jax.devices("cuda"))
    except RuntimeError:
        return False


#: Modules of tests that take seconds each: Pallas kernels are interpreted on the CPU, whole models are compiled.
SLOW_MODULES = (
    "test_checkpoint_resume",
    "test_dtypes",
    "test_encode_device",
    "test_models_attention",
    "test_models_decode_layer",
    "test_models_docs",
    "test_models_families",
    "test_models_fuse",
    "test_models_gemma_orbax",
    "test_models_oracle",
    "test_modules_adapters",
    "test_modules_docs",
    "test_modules_linen",
    "test_modules_nnx",
    "test_pallas",
    "test_transcode",
)


def _is_slow(item) -> bool:
    parameters = item.callspec.params if hasattr(item, "callspec") else {}
    return parameters.get("implementation") == "pallas" or item.module.__name__ in SLOW_MODULES


def pytest_addoption(parser):
    parser.addoption("--first-case", action="store_true", help="of each parametrized test only the first case")


def pytest_collection_modifyitems(config, items):
    if config.getoption("--first-case"):
        first = {}
        for item in items:
            first.setdefault((item.path, item.cls, getattr(item, "originalname", item.name)), item)
        config.hook.pytest_deselected(items=[item for item in items if item not in set(first.values())])
        items[:] = first.values()
    for item in items:
        if _is_slow(item):
            item.add_marker(pytest.mark.slow)
    gpu_tests = [item for item in items if "gpu" in item.keywords]
    if gpu_tests and not _has_gpu():
        # A documented limit, see README: nothing can stand in for these kernels' hardware.
        for item in gpu_tests:
            item.add_marker(pytest.mark.skip(reason="tests a GPU kernel, and there is no NVIDIA GPU (README, Limits)"))


@pytest.fixture(autouse=True)
def on_cpu_unless_marked(request):
    """On a machine with a GPU the other tests still test the CPU implementations."""
    if "gpu" in request.keywords or not _has_gpu():
        yield
        return
    import jax

    with jax.default_device(jax.devices("cpu")[0]):
        yield


@pytest.fixture
def on_gpu():
    """Computes on the first CUDA device."""
    import jax

    with jax.default_device(jax.devices("cuda")[0]):
        yield


@pytest.fixture
def on_hopper(on_gpu):
    """Computes on the first CUDA device, which is a Hopper GPU."""
    from jaxzip.ffi.libraries import compute_capabilities

    if compute_capabilities() != {(9, 0)}:
        pytest.skip("needs compute capability 9.0")
