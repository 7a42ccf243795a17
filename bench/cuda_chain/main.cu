// Bare CUDA benchmark of a decode step's chain (ffi/cuda/decode_chain): us a layer in a CUDA graph with a child graph a layer, as XLA
// runs custom calls; cold weights with the exponents of real models.
//
//   chain_bench [n=1,8,32,64] [models=llama-3.1-8b,...] [attention=1024] [search=12] [steady=300] [load=0.4]
//               [turns=3] [with=gate_up=NAME,gate_up=NAME&down=NAME,...]
//
// `attention`: the chain starts with the attention of so many tokens a row, the own one included; by default all of a layer but that.
// `steady` is how many ms each timing has the same chains run before it: what a long generation gets, whose clock the power limit lowers.
// `search` tries so many configurations of each product in the chain, one product after another, and keeps what is at least 0.5%
// faster: configurations that are fastest alone need not be so where kernels overlap.
// `load` also measures time and energy of so many seconds without a pause, of what is chosen and of that with each of these sets of
// configurations, which products' names (o, gate_up, down, tail) and & join, as "gate_up=wgmma 4/1 C1 cl112&down=wgmma 4/1 C5 cl22": in
// turns, every second of them in the other order, since what came before heats the GPU.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <functional>
#include <optional>
#include <string>
#include <vector>

#include "decode_chain/chain.h"
#include "matmul.h"
#include "options.h"
#include "product.h"
#include "timing.h"
#include "under_load.h"

namespace {

using namespace jaxzip;
using namespace jaxzip::decode_chain;
using lane_planar::MatmulConfig;
using lane_planar::Matrix;

constexpr size_t kColdBytes = 300u << 20;  // of each of a layer's four weights
constexpr int kLayers = 24, kRepeats = 7;
constexpr float kWorth = 0.995f;

struct Model {
  const char* name;
  int attention, hidden, intermediate, tail;  // widths; tail: the next layer's queries, keys and values
  int head_dim;
  bool head_norm = false;
  bool gemma = false;  // GELU, norms behind attention and MLP

  int heads() const { return attention / head_dim; }
  int kv_heads() const { return (tail / head_dim - heads()) / 2; }
};
constexpr Model kModels[] = {{"llama-3.1-8b", 4096, 4096, 14336, 6144, 128},
                             {"qwen3-14b", 5120, 5120, 17408, 7168, 128, true},
                             {"llama-3.1-70b", 8192, 8192, 28672, 10240, 128},
                             {"gemma-3-12b", 4096, 3840, 15360, 8192, 256, true, true}};

struct Layer {
  Problem weights[4];  // in the order of the chain's products
  static constexpr const char* kNames[4] = {"o", "gate_up", "down", "tail"};

  Layer(const Model& m, const ExponentClasses& classes)
      : weights{make_problem(m.hidden, m.attention, "real", classes, kColdBytes), make_problem(2 * m.intermediate, m.hidden, "real", classes, kColdBytes),
                make_problem(m.hidden, m.intermediate, "real", classes, kColdBytes), make_problem(m.tail, m.hidden, "real", classes, kColdBytes)} {}
};

template <class T>
void fill(const DeviceArray<T>& array, T value) {
  const std::vector<T> values(array.size(), value);
  CHECK(cudaMemcpy(array.get(), values.data(), values.size() * sizeof(T), cudaMemcpyHostToDevice));
}

// What attention of `tokens` a row reads; layers have caches of their own, as many as stay out of the L2 cache.
struct Cache {
  using Array = DeviceArray<__nv_bfloat16>;
  const Model& model;
  int n, tokens;
  size_t layer_size, copies;
  Array qkv, keys, values, scale;
  DeviceArray<float> angles;
  DeviceArray<int32_t> start, own;

  Cache(const Model& m, int n, int tokens)
      : model(m), n(n), tokens(tokens), layer_size(static_cast<size_t>(n) * m.kv_heads() * tokens * m.head_dim),
        copies(std::min<size_t>(kLayers, kColdBytes / (2 * sizeof(__nv_bfloat16) * layer_size) + 1)),
        qkv(static_cast<size_t>(n) * m.tail), keys(copies * layer_size), values(copies * layer_size), scale(m.head_dim),
        angles(static_cast<size_t>(n) * m.head_dim / 2), start(n), own(1) {
    for (Array* a : {&qkv, &keys, &values, &scale}) fill_gaussian(reinterpret_cast<uint16_t*>(a->get()), a->size(), 1.0f, 0, 6);
    fill(angles, 0.7f);
    fill(start, 0);
    fill(own, tokens - 1);
  }
  Attention attention(int layer, __nv_bfloat16* out) const {
    const size_t at = layer % copies * layer_size;
    Attention a = {qkv.get(), angles.get(), angles.get(), keys.get() + at, values.get() + at, start.get(), own.get(), out,
                   n, model.heads(), model.kv_heads(), model.head_dim, tokens, std::sqrt(static_cast<float>(model.head_dim))};
    if (model.head_norm) a.q_norm = a.k_norm = {scale.get(), 1e-6f};
    if (model.gemma) a.norm_offset = 1;
    return a;
  }
};

struct Buffers {
  using Array = DeviceArray<__nv_bfloat16>;
  int n;
  bool gated, gemma;
  Array attended, residual, x1, h1, gu, act, x2, h2, scale, y, o, d;
  std::optional<Cache> cache;  // if the chain has attention

  Buffers(const Model& m, int n, int tokens)
      : n(n), gated(n <= kGatedMaxN), gemma(m.gemma), attended(rows(m.attention)), residual(rows(m.hidden)), x1(rows(m.hidden)),
        h1(rows(m.hidden)), gu(rows(2 * m.intermediate)), act(rows(m.intermediate)), x2(rows(m.hidden)), h2(rows(m.hidden)),
        scale(m.hidden), y(rows(m.tail)), o(rows(m.hidden)), d(rows(m.hidden)) {
    for (Array* a : {&attended, &residual, &scale}) fill_gaussian(reinterpret_cast<uint16_t*>(a->get()), a->size(), 1.0f, 0, 5);
    if (tokens) cache.emplace(m, n, tokens);
    CHECK(cudaDeviceSynchronize());
  }
  size_t rows(int width) const { return static_cast<size_t>(n) * width; }
  Chain chain(const Layer& layer, int copy) {
    const auto w = [&](int i) { return layer.weights[i].encoded.copy(copy); };
    const Norm norm = {scale.get(), 1e-5f};
    Chain c = {w(0), w(1), w(2), w(3), norm, norm, n, attended.get(), residual.get(), x1.get(), h1.get(), gated ? nullptr : gu.get(),
               act.get(), x2.get(), h2.get(), y.get(), false};
    if (gemma) {
      c.activation = Activation::gelu_tanh, c.norm_offset = 1;
      c.o_norm = c.down_norm = norm;
      c.o_product = o.get(), c.down_product = d.get();
    }
    return c;
  }
};

cudaGraph_t captured(cudaStream_t stream, const std::function<cudaError_t()>& launches, cudaError_t* error) {
  cudaGraph_t graph;
  CHECK(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal));
  *error = launches();
  CHECK(cudaStreamEndCapture(stream, &graph));
  return graph;
}

Before before_timing;

// kLayers of them, or null where a configuration does not fit.
cudaGraph_t layers_graph(const Layer& layer, Buffers& buffers, const ChainOptions& options, cudaStream_t stream) {
  cudaGraph_t whole;
  CHECK(cudaGraphCreate(&whole, 0));
  cudaGraphNode_t last;
  cudaError_t error = cudaSuccess;
  for (int i = 0; i < kLayers && error == cudaSuccess; ++i) {
    Chain chain = buffers.chain(layer, i);
    Attention attention;
    if (buffers.cache) {
      attention = buffers.cache->attention(i, buffers.attended.get());
      chain.attention = &attention;
    }
    cudaGraph_t child = captured(stream, [&] { return launch_chain(chain, options, stream); }, &error);
    cudaGraphNode_t node;
    CHECK(cudaGraphAddChildGraphNode(&node, whole, i ? &last : nullptr, i ? 1 : 0, child));
    last = node;
    CHECK(cudaGraphDestroy(child));
  }
  if (error == cudaSuccess) return whole;
  CHECK(cudaGraphDestroy(whole));
  return nullptr;
}

// Median us a layer, or 0 where a configuration does not fit.
float layer_us(const Layer& layer, Buffers& buffers, const ChainOptions& options, cudaStream_t stream) {
  const cudaGraph_t graph = layers_graph(layer, buffers, options, stream);
  return graph ? replay_microseconds(graph, stream, kLayers, kRepeats, before_timing) : 0;
}

// Configurations of the four products.
using Given = const MatmulConfig* ChainOptions::*;
constexpr Given kGiven[4] = {&ChainOptions::o, &ChainOptions::gate_up, &ChainOptions::down, &ChainOptions::tail};

// What `load` compares: configurations that replace the chosen ones.
struct Variant {
  std::string name;
  std::optional<MatmulConfig> given[4];
  UnderLoad mean;
  double least_us = 1e30, most_us = 0;
};

Variant parse_variant(const std::string& set, int n) {
  Variant v = {set};
  for (const std::string& one : split(set, '&')) {
    const size_t equals = one.find('=');
    const auto* product = std::find(Layer::kNames, Layer::kNames + 4, one.substr(0, equals));
    const auto config = equals == one.npos ? std::nullopt : lane_planar::parse_config(one.substr(equals + 1), n);
    if (product == Layer::kNames + 4 || !config) std::fprintf(stderr, "no configuration for %d rows: %s\n", n, one.c_str()), std::exit(2);
    v.given[product - Layer::kNames] = config;
  }
  return v;
}

void under_load(const Layer& layer, Buffers& buffers, std::vector<Variant> variants, double seconds, int turns, cudaStream_t stream) {
  static const PowerMeter meter;
  for (int turn = 0; turn < turns; ++turn)
    for (size_t i = 0; i < variants.size(); ++i) {
      Variant& v = variants[turn % 2 ? variants.size() - 1 - i : i];
      ChainOptions options;
      for (int product = 0; product < 4; ++product)
        if (v.given[product]) options.*kGiven[product] = &*v.given[product];
      const cudaGraph_t graph = layers_graph(layer, buffers, options, stream);
      if (!graph) continue;
      const UnderLoad found = replay_under_load(graph, stream, kLayers, seconds, meter);
      v.mean.add(found, 1.0 / turns);
      v.least_us = std::min(v.least_us, found.us), v.most_us = std::max(v.most_us, found.us);
    }
  for (const Variant& v : variants) {
    if (!v.most_us) {
      std::printf("    does not fit: %s\n", v.name.c_str());
      continue;
    }
    std::printf("    under load %.2f us (%.2f to %.2f) %.2f mJ a layer, %.0f W, %.0f MHz: %s\n", v.mean.us, v.least_us, v.most_us, v.mean.joules * 1e3,
                v.mean.watts, v.mean.mhz, v.name.c_str());
  }
}

std::vector<MatmulConfig> to_try(const Matrix& w, int n, bool gated, size_t most) {
  Matrix dealt = w;  // the direct kernel deals pairs of a gated product as it does row groups of half of it
  if (gated) dealt.m /= 2;
  const auto wgmma = lane_planar::best_wgmma(w, n, gated);
  const auto direct = n <= 4 ? lane_planar::best_direct(dealt, n) : std::vector<lane_planar::DirectConfig>();
  std::vector<MatmulConfig> found;
  for (size_t i = 0; found.size() < most && i < std::max(wgmma.size(), direct.size()); ++i) {
    if (i < wgmma.size()) found.push_back({{}, wgmma[i]});
    if (i < direct.size()) found.push_back({direct[i], {}});
  }
  return found;
}

void search(const Layer& layer, Buffers& buffers, float own_us, size_t most, cudaStream_t stream) {
  MatmulConfig kept[4];
  ChainOptions options;
  float best_us = own_us;
  for (int i : {1, 2, 3, 0}) {  // the largest first
    const bool gated = i == 1 && buffers.gated;
    const MatmulConfig*& given = options.*kGiven[i];
    const MatmulConfig* before = given;
    for (const MatmulConfig& c : to_try(layer.weights[i].encoded.matrix, buffers.n, gated, most)) {
      given = &c;
      float us = layer_us(layer, buffers, options, stream);
      if (us > 0 && us < kWorth * best_us) us = std::max(us, layer_us(layer, buffers, options, stream));  // twice
      if (us > 0 && us < kWorth * best_us) {
        best_us = us;
        kept[i] = c;
        before = &kept[i];
        std::printf("    %-8s %s: %.2f us\n", Layer::kNames[i], show(c, buffers.n).c_str(), us);
      }
    }
    given = before;
  }
  std::printf("  N=%d: %.2f us with these, %.2f as chosen\n", buffers.n, layer_us(layer, buffers, options, stream), layer_us(layer, buffers, {}, stream));
}

}  // namespace

int main(int argc, char** argv) {
  cudaStream_t stream;
  CHECK(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
  const ExponentClasses classes = read_exponents("bench/cuda/exponents.json");
  const auto names = split(option(argc, argv, "models", "llama-3.1-8b"));
  const size_t most = std::stoul(option(argc, argv, "search", "0"));
  const int tokens = std::stoi(option(argc, argv, "attention", "0"));
  const double seconds = std::stod(option(argc, argv, "load", "0"));
  const int turns = std::stoi(option(argc, argv, "turns", "3"));
  before_timing.steady_ms = std::stoi(option(argc, argv, "steady", "0"));
  for (const Model& model : kModels) {
    if (std::find(names.begin(), names.end(), model.name) == names.end()) continue;
    const Layer layer(model, classes);
    for (const std::string& n : split(option(argc, argv, "n", "1,8,32,64"))) {
      Buffers buffers(model, std::stoi(n), tokens);
      ChainOptions apart;
      apart.overlap = false;
      const float us = layer_us(layer, buffers, {}, stream);
      std::printf("%s N=%s: %.2f us a layer, %.2f without overlap\n", model.name, n.c_str(), us, layer_us(layer, buffers, apart, stream));
      std::vector<Variant> variants = {{"as chosen"}};
      for (const std::string& set : split(option(argc, argv, "with", ""))) variants.push_back(parse_variant(set, buffers.n));
      if (seconds > 0) under_load(layer, buffers, variants, seconds, turns, stream);
      if (most) search(layer, buffers, us, most, stream);
      std::fflush(stdout);
    }
  }
}
