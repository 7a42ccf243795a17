// Several matmuls at once on two streams, and inside a replayed graph: the same bits as alone.
#include <cstdio>
#include <cstring>
#include <vector>

#include "check.h"
#include "check_kernels.h"
#include "matmul.h"
#include "product.h"

using jaxzip::Epilogue;
using namespace jaxzip::lane_planar;

namespace {

struct Job {
  Problem problem;
  int n;
  DeviceArray<__nv_bfloat16> x;
  DeviceArray<float> y;
  std::vector<float> alone;

  Job(int m, int k, int n, const ExponentClasses& classes)
      : problem(make_problem(m, k, "real", classes, 0)), n(n), x(static_cast<size_t>(n) * k),
        y(static_cast<size_t>(n) * m), alone(static_cast<size_t>(n) * m) {
    fill_gaussian(reinterpret_cast<uint16_t*>(x.get()), x.size(), 1.0f, 0, 5);
  }
  void launch(cudaStream_t stream) {
    const Epilogue epilogue = {y.get(), true, nullptr, nullptr};
    CHECK(launch_matmul(problem.encoded.matrix, x.get(), n, epilogue, {}, stream));
  }
  bool same() {
    std::vector<float> now(alone.size());
    CHECK(cudaMemcpy(now.data(), y.get(), now.size() * 4, cudaMemcpyDeviceToHost));
    CHECK(cudaMemset(y.get(), 0xFF, now.size() * 4));
    return !std::memcmp(now.data(), alone.data(), now.size() * 4);
  }
};

}  // namespace

int check_streams(const ExponentClasses& classes) {
  cudaStream_t streams[2];
  for (cudaStream_t& s : streams) CHECK(cudaStreamCreateWithFlags(&s, cudaStreamNonBlocking));
  int failures = 0;
  for (const int n : {1, 8, 32, 64, 128, 1024}) {
    Job jobs[2] = {{4096, 4096, n, classes}, {6144, 4096, n, classes}};
    for (Job& job : jobs) {
      job.launch(streams[0]);
      CHECK(cudaStreamSynchronize(streams[0]));
      CHECK(cudaMemcpy(job.alone.data(), job.y.get(), job.alone.size() * 4, cudaMemcpyDeviceToHost));
    }
    cudaGraph_t graphs[2];
    cudaGraphExec_t executables[2];
    for (int i = 0; i < 2; ++i) {
      CHECK(cudaStreamBeginCapture(streams[i], cudaStreamCaptureModeThreadLocal));
      for (int r = 0; r < 20; ++r) jobs[i].launch(streams[i]);
      CHECK(cudaStreamEndCapture(streams[i], &graphs[i]));
      CHECK(cudaGraphInstantiate(&executables[i], graphs[i], 0));
    }
    int wrong = 0;
    for (int round = 0; round < 20; ++round) {
      for (int i = 0; i < 2; ++i)
        if (round % 2)
          CHECK(cudaGraphLaunch(executables[i], streams[i]));
        else
          for (int r = 0; r < 10; ++r) jobs[i].launch(streams[i]);
      for (int i = 0; i < 2; ++i) CHECK(cudaStreamSynchronize(streams[i]));
      for (Job& job : jobs) wrong += !job.same();
    }
    for (int i = 0; i < 2; ++i) {
      CHECK(cudaGraphExecDestroy(executables[i]));
      CHECK(cudaGraphDestroy(graphs[i]));
    }
    std::printf("check two streams, N%-3d: %d of 40 wrong\n", n, wrong);
    failures += wrong;
  }
  for (cudaStream_t s : streams) CHECK(cudaStreamDestroy(s));
  return failures;
}
