"""C++ and CUDA kernels for XLA, and the thin Python that loads and calls them.

    numpy arrays --host_codecs: encode--> payload --check--> trusted payload
                                                                |
    jax arrays  --format_ops, cuda_ops--> jax.ffi.ffi_call --> handlers in _cpu and _jaxzip_cuda

`include/jaxzip/layout.h` holds the layout, `src/isa/` the kernels (compiled once per instruction set),
`src/handlers/` their XLA wrappers, `src/module.cc` the bindings, `cuda/` the CUDA handlers. Importing this package
loads no library and initialises no backend.
"""

from jaxzip.ffi.libraries import cpu_available, cpu_module, cuda_available, register, register_cuda, target_names

__all__ = ["cpu_available", "cpu_module", "cuda_available", "register", "register_cuda", "target_names"]
