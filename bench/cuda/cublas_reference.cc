// cuBLAS through dlopen: the few prototypes that the benchmark needs, so that it builds without cuBLAS headers.
#include "cublas_reference.h"

#include <dlfcn.h>

#include <cstdio>
#include <cstdlib>
#include <string>

#include "check.h"

namespace {

constexpr int kOpN = 0, kOpT = 1, kBf16 = 14, kFloat = 0, kCompute32F = 68, kDefaultAlgorithm = -1;
constexpr int kTransA = 3, kTransB = 4, kMaxWorkspace = 1, kHeuristics = 8;
constexpr size_t kWorkspace = 64 << 20;

struct HeuristicResult {
  unsigned long long algorithm[8];
  size_t workspace;
  int status;
  float waves;
  int reserved[4];
};

void* open_library(const char* name) {
  for (const char* folder : {"", "/usr/local/cuda/lib64/", "/opt/torch/.venv/lib/python3.12/site-packages/nvidia/cu13/lib/"})
    for (const char* version : {".13", ".12", ""})
      if (void* library = dlopen((std::string(folder) + name + version).c_str(), RTLD_NOW | RTLD_GLOBAL)) return library;
  std::fprintf(stderr, "no %s: put its folder into LD_LIBRARY_PATH (%s)\n", name, dlerror());
  std::exit(1);
}

template <class... Args>
int call(void* library, const char* name, Args... args) {
  using Function = int (*)(Args...);
  const auto function = reinterpret_cast<Function>(dlsym(library, name));
  if (!function) {
    std::fprintf(stderr, "cuBLAS has no %s\n", name);
    std::exit(1);
  }
  return function(args...);
}

template <class... Args>
void must(void* library, const char* name, Args... args) {
  if (const int status = call(library, name, args...)) {
    std::fprintf(stderr, "%s: status %d\n", name, status);
    std::exit(1);
  }
}

void* lt_library() {
  static void* library = open_library("libcublasLt.so");
  return library;
}
void* blas_library() {
  lt_library();
  static void* library = open_library("libcublas.so");
  return library;
}

}  // namespace

CublasReference::CublasReference(cudaStream_t stream) : stream_(stream) {
  CHECK(cudaMalloc(&workspace_, kWorkspace));
  must(blas_library(), "cublasCreate_v2", &handle_);
  must(blas_library(), "cublasSetStream_v2", handle_, stream);
  must(blas_library(), "cublasSetWorkspace_v2", handle_, workspace_, kWorkspace);
  must(lt_library(), "cublasLtCreate", &lt_);
}

int CublasReference::prepare(const DenseProduct& p) {
  const int transpose = kOpT, none = kOpN;
  const auto layout = [](void** to, int rows, int columns) {
    must(lt_library(), "cublasLtMatrixLayoutCreate", to, kBf16, static_cast<unsigned long long>(rows),
         static_cast<unsigned long long>(columns), static_cast<long long>(rows));
  };
  must(lt_library(), "cublasLtMatmulDescCreate", &operation_, kCompute32F, kFloat);
  must(lt_library(), "cublasLtMatmulDescSetAttribute", operation_, kTransA, static_cast<const void*>(&transpose), sizeof(int));
  must(lt_library(), "cublasLtMatmulDescSetAttribute", operation_, kTransB, static_cast<const void*>(&none), sizeof(int));
  layout(&w_, p.k, p.m);
  layout(&x_, p.k, p.n);
  layout(&y_, p.m, p.n);
  void* preference = nullptr;
  const size_t workspace = kWorkspace;
  must(lt_library(), "cublasLtMatmulPreferenceCreate", &preference);
  must(lt_library(), "cublasLtMatmulPreferenceSetAttribute", preference, kMaxWorkspace, static_cast<const void*>(&workspace),
       sizeof(workspace));
  HeuristicResult results[kHeuristics] = {};
  int found = 0;
  must(lt_library(), "cublasLtMatmulAlgoGetHeuristic", lt_, operation_, w_, x_, y_, y_, preference, kHeuristics, results,
       &found);
  algorithms_.clear();
  for (int i = 0; i < found; ++i) {
    if (results[i].status) continue;
    Algorithm a;
    for (int q = 0; q < 8; ++q) a.data[q] = results[i].algorithm[q];
    algorithms_.push_back(a);
  }
  must(lt_library(), "cublasLtMatmulPreferenceDestroy", preference);
  return 1 + static_cast<int>(algorithms_.size());
}

void CublasReference::run(int way, const DenseProduct& p) {
  const float one = 1, zero = 0;
  if (way == 0) {
    must(blas_library(), "cublasGemmEx", handle_, kOpT, kOpN, p.m, p.n, p.k, static_cast<const void*>(&one), p.w, kBf16, p.k,
         p.x, kBf16, p.k, static_cast<const void*>(&zero), p.y, kBf16, p.m, kCompute32F, kDefaultAlgorithm);
  } else {
    must(lt_library(), "cublasLtMatmul", lt_, operation_, static_cast<const void*>(&one), p.w, w_, p.x, x_,
         static_cast<const void*>(&zero), static_cast<const void*>(p.y), y_, p.y, y_,
         static_cast<const void*>(algorithms_[way - 1].data), workspace_, kWorkspace, stream_);
  }
}
