"""C++ and CUDA kernels for XLA, and the thin Python that loads and calls them.

    numpy arrays --encode_tca_tbe--> payload --check_tca_tbe--> trusted payload
                                                                 |
    jax arrays  --cpu_ops.{decompress, matmul, take}--> jax.ffi.ffi_call --> handlers in _cpu

`include/jaxzip/layout.h` holds the layout, `src/isa/` the kernels (compiled once per instruction set),
`src/handlers/` their XLA wrappers, `src/module.cc` the bindings, `cuda/` the CUDA handlers. Importing this package
loads no library and initialises no backend.
"""

from jaxzip.ffi.libraries import cpu_available, cpu_module, cuda_available, register, register_cuda, target_names

__all__ = ["cpu_available", "cpu_module", "cuda_available", "register", "register_cuda", "target_names"]
