// The Python module `jaxzip.ffi._cpu`: the codec on NumPy arrays, and the FFI handlers as capsules.
#include <algorithm>

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include "bands.h"
#include "codec.h"
#include "cuda/lane_planar/layout.h"
#include "dispatch.h"
#include "parallel.h"
#include "xla/ffi/api/c_api.h"

namespace jaxzip {
extern "C" {
XLA_FFI_Error* jaxzip_tca_tbe_decompress(XLA_FFI_CallFrame*);
XLA_FFI_Error* jaxzip_tca_tbe_matmul(XLA_FFI_CallFrame*);
XLA_FFI_Error* jaxzip_tca_tbe_ragged_matmul(XLA_FFI_CallFrame*);
XLA_FFI_Error* jaxzip_raw_matmul(XLA_FFI_CallFrame*);
XLA_FFI_Error* jaxzip_raw_ragged_matmul(XLA_FFI_CallFrame*);
XLA_FFI_Error* jaxzip_tca_tbe_take(XLA_FFI_CallFrame*);
XLA_FFI_Error* jaxzip_lane_planar_decompress(XLA_FFI_CallFrame*);
XLA_FFI_Error* jaxzip_lane_planar_matmul(XLA_FFI_CallFrame*);
XLA_FFI_Error* jaxzip_lane_planar_ragged_matmul(XLA_FFI_CallFrame*);
XLA_FFI_Error* jaxzip_lane_planar_take(XLA_FFI_CallFrame*);
}
}  // namespace jaxzip

namespace nb = nanobind;
using namespace nb::literals;

namespace {

using jaxzip::Array;
using jaxzip::LanePlanarPayload;
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

jaxzip::Matrix MatrixOf(const Bits2d& weight) {
  const jaxzip::Matrix w{weight.data(), static_cast<int64_t>(weight.shape(0)), static_cast<int64_t>(weight.shape(1)),
                         weight.stride(0), weight.stride(1)};
  if (w.m < 1 || w.k < 1) throw nb::value_error("weight must have at least one row and one column");
  return w;
}

// Runs `work` with a team of threads and without the GIL.
template <typename F>
auto WithoutGil(int num_threads, F&& work) {
  nb::gil_scoped_release release;
  jaxzip::ThreadTeam team(num_threads);
  return work(TeamFor(team));
}

nb::dict ToDict(jaxzip::Encoded e) {
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

nb::dict EncodeTcaTbe(const Bits2d& weight, int num_threads) {
  const jaxzip::Matrix w = MatrixOf(weight);
  return ToDict(WithoutGil(num_threads, [&](const jaxzip::For& f) { return jaxzip::EncodeTcaTbe(w, f); }));
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
    if (!layout::ValidSizes(m, k)) throw nb::value_error("m and k must be from 1 to 2**31");
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
  PayloadArrays::Raise(WithoutGil(num_threads, [&](const jaxzip::For& f) {
    return jaxzip::DecompressTcaTbe(p, data, row_stride, col_stride, f);
  }));
}

void CheckTcaTbe(JAXZIP_ARRAY_PARAMS, int64_t m, int64_t k, int num_threads) {
  const PayloadArrays arrays JAXZIP_ARRAY_ARGS;
  const Payload p = arrays.View(m, k);
  PayloadArrays::Raise(WithoutGil(num_threads, [&](const jaxzip::For& f) { return jaxzip::CheckTcaTbe(p, f); }));
}

// --- Lane-planar ---------------------------------------------------------------------------------------------------

#define JAXZIP_LP_PARAMS In<int8_t, 1> shift, In<uint32_t, 3> blocks, In<uint32_t, 1> overflow
#define JAXZIP_LP_ARGS shift, blocks, overflow
#define JAXZIP_LP_NAMES "shift"_a.noconvert(), "blocks"_a.noconvert(), "overflow"_a.noconvert()

LanePlanarPayload LanePlanarView(const In<int8_t, 1>& shift, const In<uint32_t, 3>& blocks,
                                 const In<uint32_t, 1>& overflow, int64_t m, int64_t k) {
  if (!layout::ValidSizes(m, k)) throw nb::value_error("m and k must be from 1 to 2**31");
  const auto expect = [](const char* name, size_t found, int64_t expected) {
    if (static_cast<int64_t>(found) != expected) {
      throw nb::value_error((std::string(name) + ": expected " + std::to_string(expected) + ", found " +
                             std::to_string(found)).c_str());
    }
  };
  const int64_t rows = layout::CeilDiv(m, layout::kBlock), columns = layout::CeilDiv(k, layout::kBlock);
  expect("length of shift", shift.shape(0), rows * layout::kBlock);
  expect("rows of blocks", blocks.shape(0), rows);
  expect("columns of blocks", blocks.shape(1), columns);
  expect("odd words of overflow", overflow.shape(0) % 2, 0);
  const auto words = static_cast<int>(blocks.shape(2));
  const auto& known = jaxzip::lane_planar::kBlockWidths;
  if (std::find(std::begin(known), std::end(known), words) == std::end(known)) {
    throw nb::value_error(("blocks have " + std::to_string(words) + " words").c_str());
  }
  return {m, k, shift.data(), blocks.data(), overflow.data(), static_cast<int64_t>(overflow.shape(0) / 2), words};
}

nb::dict ToDict(jaxzip::EncodedLanePlanar e) {
  nb::dict d;
  const auto rows = static_cast<size_t>(e.shift.size), overflow = static_cast<size_t>(e.overflow.size);
  const auto block_rows = static_cast<size_t>(e.block_rows), block_columns = static_cast<size_t>(e.block_columns);
  d["shift"] = ToNumpy<int8_t>(std::move(e.shift), {rows});
  d["blocks"] = ToNumpy<uint32_t>(std::move(e.blocks), {block_rows, block_columns, static_cast<size_t>(e.block_words)});
  d["overflow"] = ToNumpy<uint32_t>(std::move(e.overflow), {overflow});
  return d;
}

nb::dict EncodeLanePlanar(const Bits2d& weight, int num_threads) {
  const jaxzip::Bands bands = jaxzip::BandsOf(MatrixOf(weight));
  return ToDict(WithoutGil(num_threads, [&](const jaxzip::For& f) { return jaxzip::EncodeLanePlanar(bands, f); }));
}

void DecodeLanePlanar(JAXZIP_LP_PARAMS, Out2d out, int num_threads) {
  const auto m = static_cast<int64_t>(out.shape(0)), k = static_cast<int64_t>(out.shape(1));
  const LanePlanarPayload p = LanePlanarView(JAXZIP_LP_ARGS, m, k);
  uint16_t* data = out.data();
  const int64_t row_stride = out.stride(0), col_stride = out.stride(1);
  PayloadArrays::Raise(WithoutGil(num_threads, [&](const jaxzip::For& f) {
    return jaxzip::DecompressLanePlanar(p, data, row_stride, col_stride, f);
  }));
}

void CheckLanePlanar(JAXZIP_LP_PARAMS, int64_t m, int64_t k, int num_threads) {
  const LanePlanarPayload p = LanePlanarView(JAXZIP_LP_ARGS, m, k);
  const std::string problem =
      WithoutGil(num_threads, [&](const jaxzip::For& f) { return jaxzip::CheckLanePlanar(p, f); });
  if (!problem.empty()) throw nb::value_error(problem.c_str());
}

// --- From one format to the other, a band of rows at a time --------------------------------------------------------

nb::dict TcaTbeToLanePlanar(JAXZIP_ARRAY_PARAMS, int64_t m, int64_t k, int num_threads) {
  const PayloadArrays arrays JAXZIP_ARRAY_ARGS;
  const jaxzip::Bands bands = jaxzip::BandsOf(arrays.View(m, k));
  return ToDict(WithoutGil(num_threads, [&](const jaxzip::For& f) { return jaxzip::EncodeLanePlanar(bands, f); }));
}

nb::dict LanePlanarToTcaTbe(JAXZIP_LP_PARAMS, int64_t m, int64_t k, int num_threads) {
  const jaxzip::Bands bands = jaxzip::BandsOf(LanePlanarView(JAXZIP_LP_ARGS, m, k));
  return ToDict(WithoutGil(num_threads, [&](const jaxzip::For& f) { return jaxzip::EncodeTcaTbe(bands, f); }));
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
  d["jaxzip_tca_tbe_ragged_matmul"] = capsule(jaxzip::jaxzip_tca_tbe_ragged_matmul);
  d["jaxzip_raw_matmul"] = capsule(jaxzip::jaxzip_raw_matmul);
  d["jaxzip_raw_ragged_matmul"] = capsule(jaxzip::jaxzip_raw_ragged_matmul);
  d["jaxzip_tca_tbe_take"] = capsule(jaxzip::jaxzip_tca_tbe_take);
  d["jaxzip_lane_planar_decompress"] = capsule(jaxzip::jaxzip_lane_planar_decompress);
  d["jaxzip_lane_planar_matmul"] = capsule(jaxzip::jaxzip_lane_planar_matmul);
  d["jaxzip_lane_planar_ragged_matmul"] = capsule(jaxzip::jaxzip_lane_planar_ragged_matmul);
  d["jaxzip_lane_planar_take"] = capsule(jaxzip::jaxzip_lane_planar_take);
  return d;
}

}  // namespace

NB_MODULE(_cpu, m) {
  jaxzip::Kernels();  // a bad JAXZIP_CPU_ISA fails here, at import, and not inside a computation
  m.doc() = "Codecs of TCA-TBE and lane-planar on NumPy arrays and FFI handlers for XLA's CPU backend.";
  m.def("encode_tca_tbe", &EncodeTcaTbe, "weight"_a.noconvert(), "num_threads"_a = 0,
        "Encodes bf16 bits [M, K] (uint16, any strides); 0 threads means all cores. The result does not depend on "
        "num_threads. Raises OverflowError when the values outnumber 32-bit offsets.");
  m.def("decode_tca_tbe", &DecodeTcaTbe, JAXZIP_ARRAY_NAMES, "out"_a.noconvert(), "num_threads"_a = 0,
        "Decodes into out, uint16 [M, K] with any strides. Raises ValueError on a corrupt payload.");
  m.def("check_tca_tbe", &CheckTcaTbe, JAXZIP_ARRAY_NAMES, "m"_a, "k"_a, "num_threads"_a = 0,
        "Raises ValueError, naming field, index, expected and found, unless the payload is consistent.");
  m.def("encode_lane_planar", &EncodeLanePlanar, "weight"_a.noconvert(), "num_threads"_a = 0,
        "As encode_tca_tbe. Raises OverflowError when the escapes without a place outnumber 32 bits.");
  m.def("decode_lane_planar", &DecodeLanePlanar, JAXZIP_LP_NAMES, "out"_a.noconvert(), "num_threads"_a = 0,
        "As decode_tca_tbe; the values are checked only as far as memory safety needs.");
  m.def("check_lane_planar", &CheckLanePlanar, JAXZIP_LP_NAMES, "m"_a, "k"_a, "num_threads"_a = 0,
        "Raises ValueError, in the words of jaxzip.formats.lane_planar, unless the values are consistent.");
  m.def("tca_tbe_to_lane_planar", &TcaTbeToLanePlanar, JAXZIP_ARRAY_NAMES, "m"_a, "k"_a, "num_threads"_a = 0,
        "What encode_lane_planar makes of the decoded matrix, which never exists as a whole: 64 rows a thread do. "
        "Raises ValueError on a corrupt payload.");
  m.def("lane_planar_to_tca_tbe", &LanePlanarToTcaTbe, JAXZIP_LP_NAMES, "m"_a, "k"_a, "num_threads"_a = 0,
        "The way back, likewise.");
  m.def("layout", &Layout, "The layout constants of TCA-TBE that the kernels were compiled with.");
  m.def("handlers", &Handlers, "FFI handlers by target name, as capsules.");
  m.def("isa_levels", &jaxzip::IsaLevels, "Instruction-set levels that this machine can run, slowest first.");
  m.def("isa", [] { return std::string(jaxzip::Kernels().name); }, "The level in use.");
  m.def("set_isa", &jaxzip::SetIsa, "name"_a, "Forces a level for the process; '' goes back to the best.");
}
