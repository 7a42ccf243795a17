// The CUDA handler `jaxzip_decode_layer` (sm_90): a decode step's attention and the chain behind it as one chain, see
// decode_chain/chain.h and decode_chain/attention.h. The cache is updated in place.
#include "decode_chain_operands.h"

namespace jaxzip {
namespace {

constexpr int64_t kMaxRows = 65535;

// The scale of a norm of each head's rows; without elements, there is none.
decode_chain::Norm HeadNormOf(const char* name, const ffi::Buffer<ffi::BF16>& scale, float eps, int64_t head_dim) {
  if (scale.element_count() == 0) return {};
  return {Given(name, scale, {head_dim}), eps};
}

// An array of the cache, which is both argument and result.
__nv_bfloat16* InPlace(const char* name, const ffi::Buffer<ffi::BF16>& given, Bf16Result& result, const Dims& shape) {
  const __nv_bfloat16* before = Given(name, given, shape);
  __nv_bfloat16* after = Made(name, result, shape);
  if (before != after) throw InvalidArgument(std::string(name) + " must be updated in place: alias the result to the argument");
  return after;
}

constexpr auto kDecodeLayer = [](cudaStream_t stream, ffi::Buffer<ffi::BF16> qkv, ffi::Buffer<ffi::F32> cos, ffi::Buffer<ffi::F32> sin,
                                 ffi::Buffer<ffi::BF16> keys, ffi::Buffer<ffi::BF16> values, ffi::Buffer<ffi::S32> start,
                                 ffi::Buffer<ffi::S32> own, ffi::Buffer<ffi::BF16> q_scale, ffi::Buffer<ffi::BF16> k_scale,
                                 Bf16Result attended, Bf16Result new_keys, Bf16Result new_values, float divisor, float cap, int64_t window,
                                 float head_norm_eps, float head_norm_offset, auto... chain) {
  return Guard("jaxzip_decode_layer", [&] {
    const Bf16Operand rows("qkv", qkv, 2), cache("keys", keys, 4);
    const int64_t n = rows.core[0], kv_heads = cache.core[1], slots = cache.core[2], head_dim = cache.core[3];
    if (n > kMaxRows || slots * head_dim > INT32_MAX)
      throw InvalidArgument("attention takes up to " + std::to_string(kMaxRows) + " rows and 2^31 - 1 elements of keys of a KV head, there are " +
                            std::to_string(n) + " and " + std::to_string(slots) + " slots of " + std::to_string(head_dim));
    const int64_t all = head_dim > 0 ? rows.core[1] / head_dim : 0, heads = all - 2 * kv_heads;  // those of keys and values too
    if (kv_heads < 1 || heads < 1 || all > INT32_MAX || rows.core[1] != all * head_dim ||
        !decode_chain::attention_takes(static_cast<int>(heads), static_cast<int>(kv_heads), static_cast<int>(head_dim)))
      throw InvalidArgument("attention takes no qkv of shape " + Show(rows.core) + " with keys of shape " + Show(cache.core) +
                            ": up to 16 heads of 64 or 128 features, or 8 of 256, may share a KV head");
    if (window < 0 || window > INT32_MAX) throw InvalidArgument("window is " + std::to_string(window) + ", expected 0 or a number of slots");
    if (q_scale.element_count() != k_scale.element_count())
      throw InvalidArgument("q_scale and k_scale must both be given or both be empty");
    const decode_chain::Attention attention = {
        Given("qkv", qkv, rows.core),
        Given<float>("cos", cos, {n, head_dim / 2}),
        Given<float>("sin", sin, {n, head_dim / 2}),
        InPlace("keys", keys, new_keys, {n, kv_heads, slots, head_dim}),
        InPlace("values", values, new_values, {n, kv_heads, slots, head_dim}),
        Given<int32_t>("start", start, {n}),
        Given<int32_t>("own", own, {}),
        Made("attended", attended, {n, heads * head_dim}),
        static_cast<int>(n),
        static_cast<int>(heads),
        static_cast<int>(kv_heads),
        static_cast<int>(head_dim),
        static_cast<int>(slots),
        divisor,
        cap,
        static_cast<int>(window),
        HeadNormOf("q_scale", q_scale, head_norm_eps, head_dim),
        HeadNormOf("k_scale", k_scale, head_norm_eps, head_dim),
        head_norm_offset,
    };
    LaunchChain(stream, &attention, attention.out, n, heads * head_dim, chain...);
  });
};

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(jaxzip_decode_layer, kDecodeLayer,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::PlatformStream<cudaStream_t>>()
                                  .Arg<ffi::Buffer<ffi::BF16>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::BF16>>()
                                  .Arg<ffi::Buffer<ffi::BF16>>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Arg<ffi::Buffer<ffi::BF16>>()
                                  .Arg<ffi::Buffer<ffi::BF16>>()
                                  .Ret<ffi::Buffer<ffi::BF16>>()
                                  .Ret<ffi::Buffer<ffi::BF16>>()
                                  .Ret<ffi::Buffer<ffi::BF16>>()
                                  .Attr<float>("divisor")
                                  .Attr<float>("cap")
                                  .Attr<int64_t>("window")
                                  .Attr<float>("head_norm_eps")
                                  .Attr<float>("head_norm_offset")
                                  .JAXZIP_CHAIN_BIND,
                              {ffi::Traits::kCmdBufferCompatible});

}  // namespace jaxzip
