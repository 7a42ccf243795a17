// What the FFI handlers share: operand types, shape checks, broadcasting of batch dimensions, error mapping.
#pragma once
#include <exception>
#include <string>
#include <vector>

#include "codec.h"
#include "cuda/lane_planar/layout.h"
#include "parallel.h"
#include "xla/ffi/api/ffi.h"

namespace jaxzip {

namespace ffi = xla::ffi;

using Dims = std::vector<int64_t>;

inline std::string Show(const Dims& d) {
  std::string s = "[";
  for (size_t i = 0; i < d.size(); ++i) s += (i ? ", " : "") + std::to_string(d[i]);
  return s + "]";
}

// Thrown inside a handler and turned into ffi::Error::InvalidArgument by Guard.
struct InvalidArgument : std::exception {
  explicit InvalidArgument(std::string m) : message(std::move(m)) {}
  const char* what() const noexcept override { return message.c_str(); }
  std::string message;
};

// No exception may cross XLA's C interface.
template <typename F>
ffi::Error Guard(const char* name, F&& body) {
  try {
    body();
    return ffi::Error::Success();
  } catch (const InvalidArgument& e) {
    return ffi::Error::InvalidArgument(std::string(name) + ": " + e.message);
  } catch (const std::exception& e) {
    return ffi::Error::Internal(std::string(name) + ": " + e.what());
  }
}

inline void Require(const Fault& fault) {
  if (fault.field) throw InvalidArgument("corrupt payload: " + Describe(fault));
}

// One operand: its leading (batch) dimensions, each 1 or the batch's, and its trailing core dimensions.
template <typename T>
struct Operand {
  T* data;
  Dims batch, core;
  int64_t core_size = 1;

  template <typename Buffer>
  Operand(const char* name, const Buffer& buffer, size_t core_rank) {
    const auto dims = buffer.dimensions();
    if (dims.size() < core_rank) {
      throw InvalidArgument(std::string(name) + " has rank " + std::to_string(dims.size()) + ", needs at least " +
                            std::to_string(core_rank));
    }
    const size_t split = dims.size() - core_rank;
    batch.assign(dims.begin(), dims.begin() + split);
    core.assign(dims.begin() + split, dims.end());
    for (int64_t d : core) core_size *= d;
    data = static_cast<T*>(buffer.untyped_data());
  }

  void ExpectBatch(const char* name, const Dims& full) const {
    bool ok = batch.size() == full.size();
    for (size_t i = 0; ok && i < full.size(); ++i) ok = batch[i] == 1 || batch[i] == full[i];
    if (!ok) throw InvalidArgument(std::string(name) + " has batch dimensions " + Show(batch) + ", expected 1 or " + Show(full));
  }
  void ExpectCore(const char* name, const Dims& expected) const {
    if (core != expected) {
      throw InvalidArgument(std::string(name) + " has shape " + Show(core) + ", expected " + Show(expected));
    }
  }

  bool Unbatched() const {
    for (int64_t d : batch) {
      if (d != 1) return false;
    }
    return true;
  }
  // This operand's own batch index for flat index `i` into the full batch.
  int64_t BatchIndex(int64_t i, const Dims& full) const {
    int64_t index = 0, scale = 1;
    for (size_t d = full.size(); d-- > 0; i /= full[d]) {
      if (batch[d] != 1) {
        index += i % full[d] * scale;
        scale *= full[d];
      }
    }
    return index;
  }
  T* At(int64_t i, const Dims& full) const { return data + BatchIndex(i, full) * core_size; }
};

inline int64_t Product(const Dims& d) {
  int64_t n = 1;
  for (int64_t v : d) n *= v;
  return n;
}

// The payload operands of one call, in the order that every handler takes them.
class PayloadOperands {
 public:
  PayloadOperands(int64_t m, int64_t k, const ffi::Buffer<ffi::U8>& start_exp, const ffi::Buffer<ffi::U32>& bitmap1,
                  const ffi::Buffer<ffi::U32>& bitmap2, const ffi::Buffer<ffi::U32>& bitmap3,
                  const ffi::Buffer<ffi::U8>& sign_mantissa, const ffi::Buffer<ffi::U16>& full,
                  const ffi::Buffer<ffi::U32>& tile_offsets, const ffi::Buffer<ffi::S32>& band_offsets)
      : m_(m), k_(k), start_exp_("start_exp", start_exp, 0),
        bitmap_{{"bitmap1", bitmap1, 2}, {"bitmap2", bitmap2, 2}, {"bitmap3", bitmap3, 2}},
        sign_mantissa_("sign_mantissa", sign_mantissa, 1), full_("full", full, 1),
        tile_offsets_("tile_offsets", tile_offsets, 2), band_offsets_("band_offsets", band_offsets, 2) {
    if (!layout::ValidSizes(m, k)) {
      throw InvalidArgument("m and k must be from 1 to 2**31, are " + std::to_string(m) + " and " + std::to_string(k));
    }
    const int64_t blocks = layout::NumBlocks(m, k);
    static constexpr const char* kBitmaps[3] = {"bitmap1", "bitmap2", "bitmap3"};
    for (int i = 0; i < 3; ++i) bitmap_[i].ExpectCore(kBitmaps[i], {blocks * layout::kFragsPerBlock, 2});
    tile_offsets_.ExpectCore("tile_offsets", {blocks + 1, 2});
    band_offsets_.ExpectCore("band_offsets", {blocks * layout::kBandsPerBlock, 2});
  }

  void ExpectBatch(const Dims& full) const {
    start_exp_.ExpectBatch("start_exp", full);
    bitmap_[0].ExpectBatch("bitmap1", full);
    bitmap_[1].ExpectBatch("bitmap2", full);
    bitmap_[2].ExpectBatch("bitmap3", full);
    sign_mantissa_.ExpectBatch("sign_mantissa", full);
    full_.ExpectBatch("full", full);
    tile_offsets_.ExpectBatch("tile_offsets", full);
    band_offsets_.ExpectBatch("band_offsets", full);
  }

  bool Unbatched() const {
    return start_exp_.Unbatched() && bitmap_[0].Unbatched() && bitmap_[1].Unbatched() && bitmap_[2].Unbatched() &&
           sign_mantissa_.Unbatched() && full_.Unbatched() && tile_offsets_.Unbatched() && band_offsets_.Unbatched();
  }

  // Host memory only: looks at start_exp.
  Payload CheckedAt(int64_t i, const Dims& full) const {
    const Payload p = At(i, full);
    if (*p.start_exp > layout::kMaxStartExp) Require({"start_exp", 0, layout::kMaxStartExp, *p.start_exp});
    return p;
  }

  Payload At(int64_t i, const Dims& full) const {
    return Payload{m_,
              k_,
              start_exp_.At(i, full),
              {bitmap_[0].At(i, full), bitmap_[1].At(i, full), bitmap_[2].At(i, full)},
              sign_mantissa_.At(i, full),
              full_.At(i, full),
              tile_offsets_.At(i, full),
              band_offsets_.At(i, full),
              sign_mantissa_.core_size,
              full_.core_size};
  }

 private:
  int64_t m_, k_;
  Operand<const uint8_t> start_exp_;
  Operand<const uint32_t> bitmap_[3];
  Operand<const uint8_t> sign_mantissa_;
  Operand<const uint16_t> full_;
  Operand<const uint32_t> tile_offsets_;
  Operand<const int32_t> band_offsets_;
};

// The same for lane-planar.
class LanePlanarOperands {
 public:
  LanePlanarOperands(int64_t m, int64_t k, const ffi::Buffer<ffi::S8>& shift, const ffi::Buffer<ffi::U32>& blocks,
                     const ffi::Buffer<ffi::U32>& overflow, bool raw = false)
      : m_(m), k_(k), shift_("shift", shift, 1), blocks_("blocks", blocks, 3), overflow_("overflow", overflow, 1) {
    if (!layout::ValidSizes(m, k)) {
      throw InvalidArgument("m and k must be from 1 to 2**31, are " + std::to_string(m) + " and " + std::to_string(k));
    }
    const int64_t rows = layout::CeilDiv(m, layout::kBlock), columns = layout::CeilDiv(k, layout::kBlock);
    shift_.ExpectCore("shift", {rows * layout::kBlock});
    blocks_.ExpectCore("blocks", {rows, columns, blocks_.core[2]});
    bool known = raw && blocks_.core[2] == lane_planar::kRawBlockWords;
    for (int width : lane_planar::kBlockWidths) known |= !raw && blocks_.core[2] == width;
    if (!known) throw InvalidArgument("blocks have " + std::to_string(blocks_.core[2]) + " words");
    if (overflow_.core_size % 2) throw InvalidArgument("overflow has an odd number of words");
  }

  void ExpectBatch(const Dims& full) const {
    shift_.ExpectBatch("shift", full);
    blocks_.ExpectBatch("blocks", full);
    overflow_.ExpectBatch("overflow", full);
  }

  bool Unbatched() const { return shift_.Unbatched() && blocks_.Unbatched() && overflow_.Unbatched(); }

  LanePlanarPayload At(int64_t i, const Dims& full) const {
    return {m_, k_, shift_.At(i, full), blocks_.At(i, full), overflow_.At(i, full), overflow_.core_size / 2,
            static_cast<int>(blocks_.core[2])};
  }

 private:
  int64_t m_, k_;
  Operand<const int8_t> shift_;
  Operand<const uint32_t> blocks_, overflow_;
};

// XLA's own thread pool, with the calling thread taking part.
inline For PoolFor(ffi::ThreadPool pool) {
  return [pool](int64_t units, const std::function<void(int64_t)>& body) mutable {
    ParallelFor(units, pool.num_threads(), [&pool](std::function<void()> task) { pool.Schedule(std::move(task)); },
                body);
  };
}

using Bf16Result = ffi::Result<ffi::Buffer<ffi::BF16>>;

// What every decompress handler does: `one(i, batch, out)` decodes weight i of the batch.
template <typename Operands, typename One>
void DecompressEach(const Operands& payload, Bf16Result& out, int64_t m, int64_t k, bool transposed, One&& one) {
  const Operand<uint16_t> result("result", *out, 2);
  result.ExpectCore("result", transposed ? Dims{k, m} : Dims{m, k});
  payload.ExpectBatch(result.batch);
  for (int64_t i = 0; i < Product(result.batch); ++i) one(i, result.batch, result.At(i, result.batch));
}

// What every take handler does: `one(i, batch, ids, count, out)` decodes rows of weight i of the batch.
template <typename Operands, typename One>
void TakeEach(const Operands& payload, const ffi::Buffer<ffi::S32>& ids, Bf16Result& out, int64_t k, One&& one) {
  const Operand<const int32_t> rows("ids", ids, 1);
  const Operand<uint16_t> result("result", *out, 2);
  result.ExpectCore("result", {rows.core[0], k});
  payload.ExpectBatch(result.batch);
  rows.ExpectBatch("ids", result.batch);
  for (int64_t i = 0; i < Product(result.batch); ++i)
    one(i, result.batch, rows.At(i, result.batch), rows.core[0], result.At(i, result.batch));
}

#define JAXZIP_PAYLOAD_PARAMS                                                                            \
  ffi::Buffer<ffi::U8> start_exp, ffi::Buffer<ffi::U32> bitmap1, ffi::Buffer<ffi::U32> bitmap2,          \
      ffi::Buffer<ffi::U32> bitmap3, ffi::Buffer<ffi::U8> sign_mantissa, ffi::Buffer<ffi::U16> full,     \
      ffi::Buffer<ffi::U32> tile_offsets, ffi::Buffer<ffi::S32> band_offsets
#define JAXZIP_PAYLOAD_ARGS start_exp, bitmap1, bitmap2, bitmap3, sign_mantissa, full, tile_offsets, band_offsets
#define JAXZIP_PAYLOAD_BIND                                                            \
  Arg<ffi::Buffer<ffi::U8>>()                                                          \
      .Arg<ffi::Buffer<ffi::U32>>()                                                    \
      .Arg<ffi::Buffer<ffi::U32>>()                                                    \
      .Arg<ffi::Buffer<ffi::U32>>()                                                    \
      .Arg<ffi::Buffer<ffi::U8>>()                                                     \
      .Arg<ffi::Buffer<ffi::U16>>()                                                    \
      .Arg<ffi::Buffer<ffi::U32>>()                                                    \
      .Arg<ffi::Buffer<ffi::S32>>()

#define JAXZIP_LANE_PLANAR_PARAMS \
  ffi::Buffer<ffi::S8> shift, ffi::Buffer<ffi::U32> blocks, ffi::Buffer<ffi::U32> overflow
#define JAXZIP_LANE_PLANAR_ARGS shift, blocks, overflow
#define JAXZIP_LANE_PLANAR_BIND Arg<ffi::Buffer<ffi::S8>>().Arg<ffi::Buffer<ffi::U32>>().Arg<ffi::Buffer<ffi::U32>>()

}  // namespace jaxzip
