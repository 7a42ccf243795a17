// Checks everything in a lane-planar payload that a kernel later trusts. The checks, their order and their words are
// those of jaxzip/formats/lane_planar.py.
#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <mutex>
#include <utility>

#include "codec.h"
#include "cuda/lane_planar/layout.h"
#include "dispatch.h"

namespace jaxzip {
namespace {

using namespace lane_planar;
constexpr int kMaxShift = 40;
constexpr int kEntryBits = kPositionBits + 5;
constexpr uint32_t kPositionMask = (1u << kPositionBits) - 1, kEntryPositionMask = (1u << kEntryPositionBits) - 1;

// In the order in which they are reported: the first problem, and of it the first place.
enum Problem : int {
  kShift, kEndsDecrease, kTooMany, kPastEnds, kEntryOrder, kWrongTile,
  kOverflowOrder, kOverflowBlock, kOverflowEntry, kOverflowBefore, kOverflowIndex, kNone
};

std::string Describe(Problem problem, int64_t index, const LanePlanarPayload& p) {
  const int64_t blocks = layout::NumBlocks(p.m, p.k);
  std::string array = "blocks", what;
  switch (problem) {
    case kShift: array = "shift", what = "exceeds " + std::to_string(kMaxShift); break;
    case kEndsDecrease: what = "has ends that decrease"; break;
    case kTooMany:
      what = "counts more entries than the " + std::to_string(2 * (p.block_words - kEntryStart)) + " that it has room for";
      break;
    case kPastEnds: what = "has entries past its ends"; break;
    case kEntryOrder: what = "has entries out of order"; break;
    case kWrongTile: what = "has an entry outside the tile that its ends say"; break;
    case kOverflowOrder: array = "overflow", what = "has entries out of order"; break;
    case kOverflowBlock:
      array = "overflow", what = "names a block past the " + std::to_string(blocks) + " that there are";
      break;
    case kOverflowEntry: array = "overflow", what = "has an entry of more than 17 bits"; break;
    case kOverflowBefore: array = "overflow", what = "has an entry before the end of its block's own"; break;
    case kOverflowIndex: what = "points to a wrong overflow entry"; break;
    case kNone: return "";
  }
  return array + "[" + std::to_string(index) + "] " + what + "; the tensor is corrupt, convert it again from its source";
}

class Finding {
 public:
  void Report(Problem problem, int64_t index) {
    std::lock_guard<std::mutex> lock(mutex_);
    first_ = std::min(first_, {problem, index});
  }
  std::pair<int, int64_t> first() const { return first_; }

 private:
  std::mutex mutex_;
  std::pair<int, int64_t> first_ = {kNone, 0};
};

const char* Entries(const LanePlanarPayload& p, int64_t block) {
  return reinterpret_cast<const char*>(p.blocks + block * p.block_words + kEntryStart);
}

uint32_t EntryAt(const char* entries, int i) {
  uint16_t entry;
  std::memcpy(&entry, entries + 2 * i, 2);
  return entry;
}

// Where in the block an entry is that the ends say to be of this tile.
int PositionOf(uint32_t entry, int tile) {
  return static_cast<int>(entry & kEntryPositionMask) | tile >> 1 << kEntryPositionBits;
}

Problem CheckBlock(const LanePlanarPayload& p, int64_t block) {
  const int room = 2 * (p.block_words - kEntryStart);
  const uint32_t header = p.blocks[block * p.block_words + kHeaderStart];
  int end[kTiles];
  for (int i = 0; i < kTiles; ++i) {
    end[i] = header >> 8 * i & 0xFF;
    if (i && end[i] < end[i - 1]) return kEndsDecrease;
  }
  const int used = end[kTiles - 1];
  if (used > room) return kTooMany;
  const char* entries = Entries(p, block);
  uint32_t rest = 0;
  for (int i = used; i < room; ++i) rest |= EntryAt(entries, i);
  if (rest) return kPastEnds;
  int before = -1;
  bool in_tile = true;
  for (int tile = 0, i = 0; tile < kTiles; ++tile) {
    for (; i < end[tile]; ++i) {
      const int position = PositionOf(EntryAt(entries, i), tile);
      if (position <= before) return kEntryOrder;
      in_tile &= position / kTileElements == tile;
      before = position;
    }
  }
  return in_tile ? kNone : kWrongTile;
}

// Position of the last of a block's own entries, -1 where it has none. In a block with a problem of its own, which is
// reported before, the answer may be wrong.
int LastPosition(const LanePlanarPayload& p, int64_t block) {
  const uint32_t header = p.blocks[block * p.block_words + kHeaderStart];
  const int last = std::min<int>(2 * (p.block_words - kEntryStart), header >> 24) - 1;
  if (last < 0) return -1;
  int tile = 0;
  while (tile < kTiles - 1 && last >= static_cast<int>(header >> 8 * tile & 0xFF)) ++tile;
  return PositionOf(EntryAt(Entries(p, block), last), tile);
}

}  // namespace

std::string CheckLanePlanar(const LanePlanarPayload& p, const For& parallel_for) {
  const int64_t blocks = layout::NumBlocks(p.m, p.k), rows = layout::RoundUp(p.m, kBlock);
  Finding finding;
  for (int64_t i = 0; i < rows; ++i) {
    if (std::abs(int{p.shift[i]}) > kMaxShift) {
      finding.Report(kShift, i);
      break;
    }
  }
  constexpr int64_t kBlocksPerUnit = 256;
  parallel_for(layout::CeilDiv(blocks, kBlocksPerUnit), [&](int64_t unit) {
    for (int64_t b = unit * kBlocksPerUnit; b < std::min(blocks, (unit + 1) * kBlocksPerUnit); ++b) {
      const Problem problem = CheckBlock(p, b);
      if (problem != kNone) finding.Report(problem, b);
    }
  });
  for (int64_t i = 0; i < p.overflow_length; ++i) {
    const uint32_t owner = p.overflow[2 * i], entry = p.overflow[2 * i + 1], position = entry & kPositionMask;
    if (i && owner) {
      const uint32_t before = p.overflow[2 * i - 2], last = p.overflow[2 * i - 1] & kPositionMask;
      if (before == 0 || owner < before || (owner == before && position <= last)) finding.Report(kOverflowOrder, i - 1);
    }
    if (owner > blocks) finding.Report(kOverflowBlock, i);
    if (entry >> kEntryBits) finding.Report(kOverflowEntry, i);
    if (owner && owner <= blocks && static_cast<int>(position) <= LastPosition(p, owner - int64_t{1})) {
      finding.Report(kOverflowBefore, i);
    }
  }
  // In order they are, or this is not what gets reported: walk them beside the blocks.
  for (int64_t b = 0, i = 0; b < blocks; ++b) {
    const int64_t first = i;
    while (i < p.overflow_length && p.overflow[2 * i] == b + 1) ++i;
    if (p.blocks[b * p.block_words + kOverflowWord] != (i > first ? first + 1 : 0)) {
      finding.Report(kOverflowIndex, b);
      break;
    }
  }
  const auto [problem, index] = finding.first();
  return Describe(static_cast<Problem>(problem), index, p);
}

}  // namespace jaxzip
