// Bare CUDA check and benchmark of a decode step's attention (ffi/cuda/decode_chain/attention.cu).
//
//   attention_bench check                         against sums in fp64 on the host; exits with 1 if anything is wrong
//   attention_bench speed [n=1,8,32,64] [seen=576] [search=1]   us a launch in a CUDA graph over cold caches, beside the bytes' time;
//                                                 search: of every plan, CTAs x warps
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <string>
#include <vector>

#include "decode_chain/attention.h"
#include "options.h"
#include "weights.h"

namespace {

using jaxzip::decode_chain::Attention;
using jaxzip::decode_chain::AttentionPlan;
using jaxzip::decode_chain::launch_attention;
using jaxzip::decode_chain::plan_attention;
using Bf16 = __nv_bfloat16;

void expect(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  std::printf("%s: %s\n", what, cudaGetErrorString(error));
  std::exit(2);
}

template <class T>
struct Device {
  T* data = nullptr;
  size_t size = 0;
  explicit Device(size_t size) : size(size) { expect(cudaMalloc(&data, std::max<size_t>(size, 1) * sizeof(T)), "cudaMalloc"); }
  explicit Device(const std::vector<T>& v) : Device(v.size()) { put(v); }
  Device(const Device&) = delete;
  ~Device() { cudaFree(data); }
  void put(const std::vector<T>& v) { expect(cudaMemcpy(data, v.data(), size * sizeof(T), cudaMemcpyHostToDevice), "copy"); }
  std::vector<T> get() const {
    std::vector<T> v(size);
    expect(cudaMemcpy(v.data(), data, size * sizeof(T), cudaMemcpyDeviceToHost), "copy");
    return v;
  }
};

double rounded(double v) { return __bfloat162float(__float2bfloat16_rn(static_cast<float>(v))); }
uint16_t bits(Bf16 v) {
  uint16_t b;
  std::memcpy(&b, &v, 2);
  return b;
}

struct Case {
  int n, heads, kv_heads, head_dim, slots, own, first_start, window;
  float cap;
  bool norms, fixed;
};

struct Inputs {
  std::vector<Bf16> qkv, keys, values, q_scale, k_scale;
  std::vector<float> cos, sin;
  std::vector<int32_t> start;

  explicit Inputs(const Case& c) {
    std::mt19937 random(c.n + 3 * c.heads + 7 * c.own);
    std::normal_distribution<float> normal;
    const auto draw = [&](std::vector<Bf16>& v, size_t size, float sigma, float mean = 0) {
      v.resize(size);
      for (Bf16& x : v) x = __float2bfloat16_rn(mean + sigma * normal(random));
    };
    draw(qkv, static_cast<size_t>(c.n) * (c.heads + 2 * c.kv_heads) * c.head_dim, 1.5f);
    draw(keys, static_cast<size_t>(c.n) * c.kv_heads * c.slots * c.head_dim, 1);
    draw(values, keys.size(), 1);
    draw(q_scale, c.head_dim, 0.3f, 1);
    draw(k_scale, c.head_dim, 0.3f, 1);
    for (int i = 0; i < c.n * c.head_dim / 2; ++i) {
      const float angle = 3 * normal(random);
      cos.push_back(std::cos(angle)), sin.push_back(std::sin(angle));
    }
    for (int b = 0; b < c.n; ++b) start.push_back(std::min(c.own, c.first_start * b));
    // What is not to be seen is NaN, the own slot's old content too.
    const Bf16 nan = __float2bfloat16_rn(NAN);
    for (int b = 0; b < c.n; ++b)
      for (int h = 0; h < c.kv_heads; ++h)
        for (int t = 0; t < c.slots; ++t)
          if (t < start[b] || t >= c.own) {
            const size_t at = ((static_cast<size_t>(b) * c.kv_heads + h) * c.slots + t) * c.head_dim;
            std::fill_n(keys.begin() + at, c.head_dim, nan), std::fill_n(values.begin() + at, c.head_dim, nan);
          }
  }
};

// The head of this row behind norm and rotation, in fp64 but for the roundings that the kernel has too.
std::vector<double> rotated(const Case& c, const Inputs& in, int row, const Bf16* from, const std::vector<Bf16>& scale) {
  const int d = c.head_dim, half = d / 2;
  std::vector<double> x(d), y(d);
  double squares = 0;
  for (int i = 0; i < d; ++i) x[i] = __bfloat162float(from[i]), squares += x[i] * x[i];
  if (c.norms)
    for (int i = 0; i < d; ++i) x[i] = rounded(x[i] / std::sqrt(squares / d + 1e-6) * (__bfloat162float(scale[i]) + 1));
  for (int i = 0; i < half; ++i) {
    const double cosine = in.cos[static_cast<size_t>(row) * half + i], sine = in.sin[static_cast<size_t>(row) * half + i];
    y[i] = rounded(x[i] * cosine - x[i + half] * sine);
    y[i + half] = rounded(x[i + half] * cosine + x[i] * sine);
  }
  return y;
}

struct Outputs {
  std::vector<Bf16> out, keys, values;
};

Outputs run(const Case& c, const Inputs& in, int n, const AttentionPlan* given = nullptr) {
  Device<Bf16> qkv(in.qkv), keys(in.keys), values(in.values), q_scale(in.q_scale), k_scale(in.k_scale),
      out(static_cast<size_t>(c.n) * c.heads * c.head_dim);
  Device<float> cos(in.cos), sin(in.sin);
  Device<int32_t> start(in.start), own(std::vector<int32_t>{c.own});
  Attention a = {qkv.data, cos.data, sin.data, keys.data, values.data, start.data, own.data, out.data,
                 n, c.heads, c.kv_heads, c.head_dim, c.slots, std::sqrt(static_cast<float>(c.head_dim)), c.cap, c.window};
  if (c.norms) a.q_norm = {q_scale.data, 1e-6f}, a.k_norm = {k_scale.data, 1e-6f}, a.norm_offset = 1;
  const AttentionPlan plan = given ? *given : plan_attention(a, c.fixed);
  expect(launch_attention(a, plan, nullptr), "launch");
  expect(cudaDeviceSynchronize(), "kernel");
  return {out.get(), keys.get(), values.get()};
}

bool check(const Case& c) {
  const Inputs in(c);
  const Outputs found = run(c, in, c.n), again = run(c, in, c.n);
  const int d = c.head_dim, group = c.heads / c.kv_heads;
  double worst = 0;
  int wrong = 0, other_bits = 0;
  for (size_t i = 0; i < found.out.size(); ++i) other_bits += bits(found.out[i]) != bits(again.out[i]);
  for (int b = 0; b < c.n; ++b) {
    const Bf16* qkv = in.qkv.data() + static_cast<size_t>(b) * (c.heads + 2 * c.kv_heads) * d;
    for (int h = 0; h < c.kv_heads; ++h) {
      const std::vector<double> new_key = rotated(c, in, b, qkv + (c.heads + h) * d, in.k_scale);
      const Bf16* new_value = qkv + (c.heads + c.kv_heads + h) * d;
      const size_t cache = (static_cast<size_t>(b) * c.kv_heads + h) * c.slots * d;
      for (int t = 0; t < c.slots; ++t)
        for (int i = 0; i < d; ++i) {
          const size_t at = cache + static_cast<size_t>(t) * d + i;
          if (t != c.own) {
            wrong += bits(found.keys[at]) != bits(in.keys[at]) || bits(found.values[at]) != bits(in.values[at]);
          } else {
            const double key = __bfloat162float(found.keys[at]);
            wrong += !(std::abs(key - new_key[i]) <= 0.02 + 0.01 * std::abs(new_key[i])) || bits(found.values[at]) != bits(new_value[i]);
          }
        }
      const int first = std::max(in.start[b], c.window ? c.own - c.window + 1 : 0);
      for (int m = 0; m < group; ++m) {
        const std::vector<double> query = rotated(c, in, b, qkv + (h * group + m) * d, in.q_scale);
        std::vector<double> scores, sums(d, 0);
        double most = -1e300, total = 0;
        for (int t = first; t <= c.own; ++t) {
          double s = 0;
          for (int i = 0; i < d; ++i) s += query[i] * (t == c.own ? new_key[i] : __bfloat162float(in.keys[cache + static_cast<size_t>(t) * d + i]));
          s /= std::sqrt(static_cast<double>(d));
          if (c.cap) s = c.cap * std::tanh(s / c.cap);
          scores.push_back(s), most = std::max(most, s);
        }
        for (int t = first; t <= c.own; ++t) {
          const double weight = std::exp(scores[t - first] - most);
          total += weight;
          for (int i = 0; i < d; ++i)
            sums[i] += weight * __bfloat162float(t == c.own ? new_value[i] : in.values[cache + static_cast<size_t>(t) * d + i]);
        }
        for (int i = 0; i < d; ++i) {
          const double y = __bfloat162float(found.out[(static_cast<size_t>(b) * c.heads + h * group + m) * d + i]), off = std::abs(y - sums[i] / total);
          if (!(off <= 0.06)) ++wrong;
          worst = std::max(worst, off);
        }
      }
    }
  }
  if (c.fixed)
    for (const int n : {1, c.n / 2}) {
      const Outputs fewer = run(c, in, n);
      for (int i = 0; i < n * c.heads * d; ++i) other_bits += bits(fewer.out[i]) != bits(found.out[i]);
    }
  const bool ok = !wrong && !other_bits;
  std::printf("%-5s n%-3d %d/%d heads of %d, %d slots, own %d, start %d b, window %d, cap %g%s%s: off by %.4f at most, %d wrong, %d other bits\n",
              ok ? "right" : "WRONG", c.n, c.heads, c.kv_heads, d, c.slots, c.own, c.first_start, c.window, c.cap, c.norms ? ", norms" : "",
              c.fixed ? ", fixed" : "", worst, wrong, other_bits);
  return ok;
}

int check_all() {
  const Case cases[] = {
      {1, 32, 8, 128, 600, 575, 0, 0, 0, false, false},  {3, 32, 8, 128, 300, 257, 100, 0, 0, false, false}, {40, 8, 2, 128, 200, 150, 7, 0, 0, false, false},
      {70, 8, 8, 128, 100, 99, 3, 0, 0, false, false},   {2, 8, 1, 128, 100, 0, 0, 0, 0, false, false},     {2, 8, 2, 64, 333, 332, 332, 0, 0, true, false},
      {1, 16, 8, 256, 900, 801, 0, 0, 50, true, false},  {9, 16, 8, 256, 200, 177, 20, 64, 0, true, false}, {5, 40, 8, 128, 150, 100, 30, 1000, 30, true, false},
      {4, 64, 8, 128, 150, 133, 9, 17, 0, false, false}, {2, 16, 1, 64, 150, 133, 9, 0, 0, false, false},   {2, 32, 2, 128, 150, 15, 3, 0, 0, true, false},
      {33, 9, 3, 64, 70, 16, 1, 0, 20, false, false},    {6, 24, 8, 128, 400, 331, 40, 0, 0, false, true},  {7, 16, 1, 128, 400, 300, 50, 100, 0, true, true},
      {4, 8, 4, 256, 100, 63, 0, 0, 0, false, true},     {1, 5, 1, 128, 4000, 3999, 0, 0, 0, false, false},  {150, 32, 8, 128, 40, 31, 0, 1, 0, false, false}};
  int wrong = 0;
  for (const Case& c : cases) wrong += !check(c);
  std::printf("attention: %d of %d wrong\n", wrong, static_cast<int>(sizeof(cases) / sizeof(Case)));
  return wrong != 0;
}

struct Model {
  const char* name;
  int heads, kv_heads, head_dim;
};
constexpr Model kModels[] = {{"llama-3.1-8b", 32, 8, 128}, {"llama-3.1-70b", 64, 8, 128}, {"qwen3-14b", 40, 8, 128}, {"gemma-3-12b", 16, 8, 256}};

float time_of(const std::vector<Attention>& layers, const AttentionPlan& plan) {
  constexpr int kRepeats = 7, kLaunches = 48;
  cudaStream_t stream;
  expect(cudaStreamCreate(&stream), "stream");
  expect(cudaStreamBeginCapture(stream, cudaStreamCaptureModeGlobal), "capture");
  for (int i = 0; i < kLaunches; ++i) expect(launch_attention(layers[i % layers.size()], plan, stream), "launch");
  cudaGraph_t graph;
  cudaGraphExec_t exec;
  expect(cudaStreamEndCapture(stream, &graph), "capture");
  expect(cudaGraphInstantiate(&exec, graph, 0), "instantiate");
  cudaEvent_t begin, end;
  expect(cudaEventCreate(&begin), "event");
  expect(cudaEventCreate(&end), "event");
  std::vector<float> times;
  for (int i = 0; i <= kRepeats; ++i) {
    cudaEventRecord(begin, stream);
    cudaGraphLaunch(exec, stream);
    cudaEventRecord(end, stream);
    expect(cudaEventSynchronize(end), "graph");
    float ms;
    cudaEventElapsedTime(&ms, begin, end);
    if (i) times.push_back(ms * 1000 / kLaunches);
  }
  std::sort(times.begin(), times.end());
  cudaGraphExecDestroy(exec), cudaGraphDestroy(graph), cudaStreamDestroy(stream);
  return times[times.size() / 2];
}

int speed(const std::vector<int>& rows, int seen, bool search) {
  const int slots = seen + 200;
  for (const Model& m : kModels)
    for (const int n : rows) {
      const size_t cache = static_cast<size_t>(n) * m.kv_heads * slots * m.head_dim, width = static_cast<size_t>(m.heads + 2 * m.kv_heads) * m.head_dim;
      const int copies = static_cast<int>(std::clamp<size_t>((300u << 20) / (cache * 4) + 1, 2, 48));
      Device<Bf16> keys(cache * copies), values(cache * copies), qkv(n * width), out(static_cast<size_t>(n) * m.heads * m.head_dim);
      const std::vector<float> angles(static_cast<size_t>(n) * m.head_dim / 2, 0.7f);
      Device<float> cos(angles), sin(angles);
      Device<int32_t> start(std::vector<int32_t>(n, 0)), own(std::vector<int32_t>{seen - 1});
      uint32_t seed = 0;
      for (Device<Bf16>* d : {&keys, &values, &qkv}) fill_gaussian(reinterpret_cast<uint16_t*>(d->data), d->size, 1, 0, ++seed);  // zeros take less time
      expect(cudaDeviceSynchronize(), "fill");
      std::vector<Attention> layers;
      for (int i = 0; i < copies; ++i)
        layers.push_back({qkv.data, cos.data, sin.data, keys.data + i * cache, values.data + i * cache, start.data, own.data, out.data, n, m.heads,
                          m.kv_heads, m.head_dim, slots, 11.3f});
      const double bytes = 4.0 * n * m.kv_heads * seen * m.head_dim;
      const AttentionPlan plan = plan_attention(layers[0], false);
      const float us = time_of(layers, plan);
      std::printf("%-14s n%-3d %d slots: %.2f us, %.2f TB/s, bytes take %.2f at 4.2\n", m.name, n, seen, us, bytes / us * 1e-6,
                  bytes / 4.2e6);
      if (!search) continue;
      for (const int warps : {2, 4, 8})
        for (int splits = 1; splits <= 8; ++splits)
          if (warps * splits * n * m.kv_heads <= 4096) std::printf("  %dx%d %.2f", splits, warps, time_of(layers, {warps, splits}));
      std::printf("\n");
    }
  return 0;
}

}  // namespace

int main(int argc, char** argv) {
  const std::string what = argc > 1 ? argv[1] : "";
  if (what == "check") return check_all();
  if (what == "speed") {
    std::vector<int> rows;
    for (const std::string& n : split(option(argc, argv, "n", "1,8,32,64"))) rows.push_back(std::stoi(n));
    return speed(rows, std::stoi(option(argc, argv, "seen", "576")), option(argc, argv, "search", "0") == "1");
  }
  std::printf("usage: attention_bench check | speed [n=1,8,32,64] [seen=576]\n");
  return 2;
}
