// The Python module `jaxzip.ffi._cpu`: the codec on NumPy arrays, and the FFI handlers as capsules.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include "codec.h"
#include "dispatch.h"
#include "parallel.h"
#include "xla/ffi/api/c_api.h"

namespace jaxzip {
extern "C" {
XLA_FFI_Error* jaxzip_tca_tbe_decompress(XLA_FFI_CallFrame*);
XLA_FFI_Error* jaxzip_tca_tbe_matmul(XLA_FFI_CallFrame*);
XLA_FFI_Error* jaxzip_raw_matmul(XLA_FFI_CallFrame*);
XLA_FFI_Error* jaxzip_tca_tbe_take(XLA_FFI_CallFrame*);
}
}  // namespace jaxzip

namespace nb = nanobind;
using namespace nb::literals;

namespace {

using jaxzip::Array;
using jaxzip::Payload;
namespace layout = jaxzip::layout;

using Bits2d = nb::ndarray<const uint16_t, nb::ndim<2>, nb::device::cpu>;
using Out2d = nb::ndarray<uint16_t, nb::ndim<2>, nb::device::cpu>;
template <typename T, int kRank>
using In = nb::ndarray<const T, nb::ndim<kRank>, nb::c_contig, nb::device::cpu>;

// Hands an owned array over to NumPy.
template <typename Out, typename T>
nb::object ToNumpy(Array<T> a, std::initializer_list<size_t> shape) {
  T* p = a.data.release();
  nb::capsule owner(p, [](void* q) noexcept { std::free(q); });
  return nb::cast(nb::ndarray<nb::numpy, Out>(p, shape, owner));
}

jaxzip::For TeamFor(jaxzip::ThreadTeam& team) {
  return [&team](int64_t units, const std::function<void(int64_t)>& body) { team.For(units, body); };
}

nb::dict EncodeTcaTbe(const Bits2d& weight, int num_threads) {
  const jaxzip::Matrix w{weight.data(), static_cast<int64_t>(weight.shape(0)), static_cast<int64_t>(weight.shape(1)),
                         weight.stride(0), weight.stride(1)};
  if (w.m < 1 || w.k < 1) throw nb::value_error("weight must have at least one row and one column");
  jaxzip::Encoded e;
  {
    nb::gil_scoped_release release;
    jaxzip::ThreadTeam team(num_threads);
    e = jaxzip::EncodeTcaTbe(w, TeamFor(team));
  }
  nb::dict d;
  auto* start = static_cast<uint8_t*>(std::malloc(1));
  *start = e.start_exp;
  d["start_exp"] = nb::cast(nb::ndarray<nb::numpy, uint8_t>(
      start, {}, nb::capsule(start, [](void* q) noexcept { std::free(q); })));
  static constexpr const char* kNames[3] = {"bitmap1", "bitmap2", "bitmap3"};
  for (int i = 0; i < 3; ++i) {
    const auto frags = static_cast<size_t>(e.bitmap[i].size);
    d[kNames[i]] = ToNumpy<uint32_t>(std::move(e.bitmap[i]), {frags, 2});
  }
  const auto sm = static_cast<size_t>(e.sign_mantissa.size), full = static_cast<size_t>(e.full.size);
  const auto tiles = static_cast<size_t>(e.tile_offsets.size), bands = static_cast<size_t>(e.band_offsets.size);
  d["sign_mantissa"] = ToNumpy<uint8_t>(std::move(e.sign_mantissa), {sm});
  d["full"] = ToNumpy<uint16_t>(std::move(e.full), {full});
  d["tile_offsets"] = ToNumpy<uint32_t>(std::move(e.tile_offsets), {tiles / 2, 2});
  d["band_offsets"] = ToNumpy<int32_t>(std::move(e.band_offsets), {bands / 2, 2});
  return d;
}

void ExpectRows(const char* name, int64_t found, int64_t second, int64_t expected) {
  if (found != expected || second != 2) {
    throw nb::value_error((std::string(name) + ": expected shape [" + std::to_string(expected) + ", 2], found [" +
                           std::to_string(found) + ", " + std::to_string(second) + "]").c_str());
  }
}

struct PayloadArrays {
  In<uint8_t, 0> start_exp;
  In<uint32_t, 2> bitmap1, bitmap2, bitmap3;
  In<uint8_t, 1> sign_mantissa;
  In<uint16_t, 1> full;
  In<uint32_t, 2> tile_offsets;
  In<int32_t, 2> band_offsets;

  Payload View(int64_t m, int64_t k) const {
    if (m < 1 || k < 1) throw nb::value_error("m and k must be positive");
    const int64_t blocks = layout::NumBlocks(m, k), frags = blocks * layout::kFragsPerBlock;
    ExpectRows("bitmap1", bitmap1.shape(0), bitmap1.shape(1), frags);
    ExpectRows("bitmap2", bitmap2.shape(0), bitmap2.shape(1), frags);
    ExpectRows("bitmap3", bitmap3.shape(0), bitmap3.shape(1), frags);
    ExpectRows("tile_offsets", tile_offsets.shape(0), tile_offsets.shape(1), blocks + 1);
    ExpectRows("band_offsets", band_offsets.shape(0), band_offsets.shape(1), blocks * layout::kBandsPerBlock);
    const Payload p{m, k, start_exp.data(), {bitmap1.data(), bitmap2.data(), bitmap3.data()}, sign_mantissa.data(),
                    full.data(), tile_offsets.data(), band_offsets.data(),
                    static_cast<int64_t>(sign_mantissa.shape(0)), static_cast<int64_t>(full.shape(0))};
    if (*p.start_exp > layout::kMaxStartExp) {
      Raise({"start_exp", 0, layout::kMaxStartExp, *p.start_exp});
    }
    return p;
  }
  static void Raise(const jaxzip::Fault& fault) {
    if (fault.field) throw nb::value_error(jaxzip::Describe(fault).c_str());
  }
};

#define JAXZIP_ARRAY_PARAMS                                                                                    \
  In<uint8_t, 0> start_exp, In<uint32_t, 2> bitmap1, In<uint32_t, 2> bitmap2, In<uint32_t, 2> bitmap3,         \
      In<uint8_t, 1> sign_mantissa, In<uint16_t, 1> full, In<uint32_t, 2> tile_offsets, In<int32_t, 2> band_offsets
#define JAXZIP_ARRAY_ARGS {start_exp, bitmap1, bitmap2, bitmap3, sign_mantissa, full, tile_offsets, band_offsets}
#define JAXZIP_ARRAY_NAMES                                                                                   \
  "start_exp"_a.noconvert(), "bitmap1"_a.noconvert(), "bitmap2"_a.noconvert(), "bitmap3"_a.noconvert(),      \
      "sign_mantissa"_a.noconvert(), "full"_a.noconvert(), "tile_offsets"_a.noconvert(), "band_offsets"_a.noconvert()

void DecodeTcaTbe(JAXZIP_ARRAY_PARAMS, Out2d out, int num_threads) {
  const PayloadArrays arrays JAXZIP_ARRAY_ARGS;
  const auto m = static_cast<int64_t>(out.shape(0)), k = static_cast<int64_t>(out.shape(1));
  const Payload p = arrays.View(m, k);
  uint16_t* data = out.data();
  const int64_t row_stride = out.stride(0), col_stride = out.stride(1);
  jaxzip::Fault fault;
  {
    nb::gil_scoped_release release;
    jaxzip::ThreadTeam team(num_threads);
    fault = jaxzip::DecompressTcaTbe(p, data, row_stride, col_stride, TeamFor(team));
  }
  PayloadArrays::Raise(fault);
}

void CheckTcaTbe(JAXZIP_ARRAY_PARAMS, int64_t m, int64_t k, int num_threads) {
  const PayloadArrays arrays JAXZIP_ARRAY_ARGS;
  const Payload p = arrays.View(m, k);
  jaxzip::Fault fault;
  {
    nb::gil_scoped_release release;
    jaxzip::ThreadTeam team(num_threads);
    fault = jaxzip::CheckTcaTbe(p, TeamFor(team));
  }
  PayloadArrays::Raise(fault);
}

nb::dict Layout() {
  nb::dict d;
  d["frag"] = layout::kFrag;
  d["tensor_core"] = layout::kTensorCore;
  d["band_rows"] = layout::kBandRows;
  d["block"] = layout::kBlock;
  d["bands_per_block"] = layout::kBandsPerBlock;
  d["frags_per_band"] = layout::kFragsPerBand;
  d["frags_per_block"] = layout::kFragsPerBlock;
  d["window"] = layout::kWindow;
  d["max_start_exp"] = layout::kMaxStartExp;
  d["sign_mantissa_align"] = layout::kSignMantissaAlign;
  d["full_align"] = layout::kFullAlign;
  nb::list order;
  for (int f = 0; f < layout::kFragsPerBlock; ++f) order.append(nb::make_tuple(layout::FragRow(f), layout::FragCol(f)));
  d["frag_order"] = order;
  return d;
}

nb::dict Handlers() {
  auto capsule = [](XLA_FFI_Error* (*handler)(XLA_FFI_CallFrame*)) {
    return nb::capsule(reinterpret_cast<void*>(handler));
  };
  nb::dict d;
  d["jaxzip_tca_tbe_decompress"] = capsule(jaxzip::jaxzip_tca_tbe_decompress);
  d["jaxzip_tca_tbe_matmul"] = capsule(jaxzip::jaxzip_tca_tbe_matmul);
  d["jaxzip_raw_matmul"] = capsule(jaxzip::jaxzip_raw_matmul);
  d["jaxzip_tca_tbe_take"] = capsule(jaxzip::jaxzip_tca_tbe_take);
  return d;
}

}  // namespace

NB_MODULE(_cpu, m) {
  jaxzip::Kernels();  // a bad JAXZIP_CPU_ISA fails here, at import, and not inside a computation
  m.doc() = "TCA-TBE codec on NumPy arrays and FFI handlers for XLA's CPU backend.";
  m.def("encode_tca_tbe", &EncodeTcaTbe, "weight"_a.noconvert(), "num_threads"_a = 0,
        "Encodes bf16 bits [M, K] (uint16, any strides); 0 threads means all cores. The result does not depend on "
        "num_threads. Raises OverflowError when the values outnumber 32-bit offsets.");
  m.def("decode_tca_tbe", &DecodeTcaTbe, JAXZIP_ARRAY_NAMES, "out"_a.noconvert(), "num_threads"_a = 0,
        "Decodes into out, uint16 [M, K] with any strides. Raises ValueError on a corrupt payload.");
  m.def("check_tca_tbe", &CheckTcaTbe, JAXZIP_ARRAY_NAMES, "m"_a, "k"_a, "num_threads"_a = 0,
        "Raises ValueError, naming field, index, expected and found, unless the payload is consistent.");
  m.def("layout", &Layout, "The layout constants of TCA-TBE that the kernels were compiled with.");
  m.def("handlers", &Handlers, "FFI handlers by target name, as capsules.");
  m.def("isa_levels", &jaxzip::IsaLevels, "Instruction-set levels that this machine can run, slowest first.");
  m.def("isa", [] { return std::string(jaxzip::Kernels().name); }, "The level in use.");
  m.def("set_isa", &jaxzip::SetIsa, "name"_a, "Forces a level for the process; '' goes back to the best.");
}
