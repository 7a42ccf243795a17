// Time, energy and clock of a graph's launches while the GPU runs nothing else and never idles: what a loop that does not end gets.
#pragma once
#include <dlfcn.h>

#include <chrono>
#include <cstdio>
#include <cstdlib>

#include "check.h"

// What NVML says of the current device; ends the program where there is no NVML.
class PowerMeter {
 public:
  PowerMeter() {
    void* library = dlopen("libnvidia-ml.so.1", RTLD_NOW);
    char bus[32];
    int device;
    CHECK(cudaGetDevice(&device));
    CHECK(cudaDeviceGetPCIBusId(bus, sizeof(bus), device));
    using Init = int (*)();
    using Find = int (*)(const char*, void**);
    const auto symbol = [&](const char* name) { return library ? dlsym(library, name) : nullptr; };
    const auto init = reinterpret_cast<Init>(symbol("nvmlInit_v2"));
    const auto find = reinterpret_cast<Find>(symbol("nvmlDeviceGetHandleByPciBusId_v2"));
    energy_ = reinterpret_cast<Energy>(symbol("nvmlDeviceGetTotalEnergyConsumption"));
    clock_ = reinterpret_cast<Clock>(symbol("nvmlDeviceGetClockInfo"));
    if (!init || !find || !energy_ || !clock_ || init() || find(bus, &device_)) {
      std::fprintf(stderr, "no energy of GPU %s: libnvidia-ml.so.1 is not there, or does not know it\n", bus);
      std::exit(1);
    }
  }
  double joules() const {
    unsigned long long millijoules = 0;
    energy_(device_, &millijoules);
    return millijoules * 1e-3;
  }
  unsigned sm_mhz() const {
    unsigned mhz = 0;
    constexpr int kSmClock = 1;
    clock_(device_, kSmClock, &mhz);
    return mhz;
  }

 private:
  using Energy = int (*)(void*, unsigned long long*);
  using Clock = int (*)(void*, int, unsigned*);
  Energy energy_;
  Clock clock_;
  void* device_ = nullptr;
};

struct UnderLoad {
  double us = 0, joules = 0;  // of a launch
  double watts = 0, mhz = 0;
  // For a mean of turns, of which `other` is such a share.
  void add(const UnderLoad& other, double share) {
    us += share * other.us, joules += share * other.joules;
    watts += share * other.watts, mhz += share * other.mhz;
  }
};

// Replays a graph of `count` launches for so many seconds after 0.12 of it, and destroys it.
inline UnderLoad replay_under_load(cudaGraph_t graph, cudaStream_t stream, int count, double seconds, const PowerMeter& meter) {
  constexpr double kSettle = 0.12, kLongestTick = 0.3;
  constexpr int kGraphs = 4, kBetweenClocks = 16;
  cudaGraphExec_t executable;
  cudaEvent_t ends[2];
  CHECK(cudaGraphInstantiate(&executable, graph, 0));
  for (cudaEvent_t& end : ends) CHECK(cudaEventCreateWithFlags(&end, cudaEventDisableTiming));
  const auto now = [] { return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count(); };
  // Two batches are in flight, so that the GPU has work while the host does something else.
  long batches = 0;
  const auto enqueue = [&] {
    for (int i = 0; i < kGraphs; ++i) CHECK(cudaGraphLaunch(executable, stream));
    CHECK(cudaEventRecord(ends[batches++ & 1], stream));
  };
  const auto next = [&] {
    CHECK(cudaEventSynchronize(ends[batches & 1]));
    enqueue();
  };
  // The counter moves some ten times a second: returns when it has just done so.
  const auto tick = [&] {
    const double before = meter.joules(), begin = now();
    double after = before;
    while ((after = meter.joules()) == before && now() - begin < kLongestTick)
      if (cudaEventQuery(ends[batches & 1]) == cudaSuccess) enqueue();
    return after;
  };
  enqueue();
  enqueue();
  for (const double begin = now(); now() - begin < kSettle;) next();
  const double first_joules = tick(), first_tick = now();
  next();
  const long first = batches;
  const double begin = now();
  double mhz = 0;
  int clocks = 0;
  while (now() - begin < seconds) {
    next();
    if (batches % kBetweenClocks == 0) mhz += meter.sm_mhz(), ++clocks;
  }
  const double us = (now() - begin) * 1e6 / (batches - first) / kGraphs / count;
  const double last_joules = tick(), watts = (last_joules - first_joules) / (now() - first_tick);
  CHECK(cudaStreamSynchronize(stream));
  for (const cudaEvent_t end : ends) CHECK(cudaEventDestroy(end));
  CHECK(cudaGraphExecDestroy(executable));
  CHECK(cudaGraphDestroy(graph));
  return {us, watts * us * 1e-6, watts, clocks ? mhz / clocks : 0};
}
