// Median time of one launch inside a CUDA graph of many.
#pragma once
#include <algorithm>
#include <chrono>
#include <functional>
#include <thread>
#include <vector>

#include "check.h"

// What the GPU did before a timing. It lowers its clock at its power limit, so what ran before and for how long changes a time.
struct Before {
  int idle_ms = 0;    // nothing
  int steady_ms = 0;  // then the same launches: what a loop that never ends gets
};

// Replays a graph of `count` launches and destroys it; median time per launch in us.
inline float replay_microseconds(cudaGraph_t graph, cudaStream_t stream, int count, int repeats, const Before& before = {}) {
  cudaGraphExec_t executable;
  CHECK(cudaGraphInstantiate(&executable, graph, 0));
  cudaEvent_t start, stop;
  CHECK(cudaEventCreate(&start));
  CHECK(cudaEventCreate(&stop));
  CHECK(cudaGraphLaunch(executable, stream));
  if (before.idle_ms) {
    CHECK(cudaStreamSynchronize(stream));
    std::this_thread::sleep_for(std::chrono::milliseconds(before.idle_ms));
  }
  const auto begin = std::chrono::steady_clock::now();
  while (std::chrono::steady_clock::now() - begin < std::chrono::milliseconds(before.steady_ms)) {
    CHECK(cudaGraphLaunch(executable, stream));
    CHECK(cudaStreamSynchronize(stream));
  }
  std::vector<float> times;
  for (int r = 0; r < repeats; ++r) {
    CHECK(cudaEventRecord(start, stream));
    CHECK(cudaGraphLaunch(executable, stream));
    CHECK(cudaEventRecord(stop, stream));
    CHECK(cudaEventSynchronize(stop));
    float ms;
    CHECK(cudaEventElapsedTime(&ms, start, stop));
    times.push_back(ms * 1000 / count);
  }
  std::sort(times.begin(), times.end());
  CHECK(cudaEventDestroy(start));
  CHECK(cudaEventDestroy(stop));
  CHECK(cudaGraphExecDestroy(executable));
  CHECK(cudaGraphDestroy(graph));
  return times[repeats / 2];
}

// The same of launches 0..count-1 of `launch`, captured into a graph.
inline float graph_microseconds(cudaStream_t stream, const std::function<void(int)>& launch, int count, int repeats,
                                const Before& before = {}) {
  cudaGraph_t graph;
  CHECK(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal));
  for (int i = 0; i < count; ++i) launch(i);
  CHECK(cudaStreamEndCapture(stream, &graph));
  return replay_microseconds(graph, stream, count, repeats, before);
}
