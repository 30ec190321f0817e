// The race of soft_nms.h, the same source for every instruction set: soft_nms_<isa>.cc includes it and defines the five
// functions declared below. Everything is in an anonymous namespace, so each file has a copy for its own processor.
//
// The boxes in the race are sorted along a space-filling curve (Morton's), which keeps neighbours together, and cut
// into blocks of 16. Each block has a bounding box and its best score. So a pick visits only blocks that it may
// overlap. The next pick is the best of the blocks' best scores, and only the visited blocks have changed. When half of
// the slots are empty, the remaining boxes move together.
#pragma once

#include "soft_nms.h"

#include <cfloat>

namespace calmclip {
namespace {

constexpr int32_t kGone = INT32_MIN;  // below the key of -inf
constexpr size_t kBlock = 16;

struct Box {
  float x0, y0, x1, y1, area;
};

struct Rule {
  int method;
  float threshold;
  float steepness;  // -1 / sigma
  float min_score;
};

// A box that touches nothing, not even itself.
constexpr float kNowhereLow = FLT_MAX, kNowhereHigh = -FLT_MAX;

struct Field {
  // per box, padded to whole blocks; all arrays are aligned to 64 bytes
  float *x0, *y0, *x1, *y1, *area;
  int32_t* key;    // the score, as `key_of`; kGone: out of the race
  int32_t* place;  // index into the input
  // per block, padded to a multiple of 64 with empty blocks that touch nothing
  float *low_x, *low_y, *high_x, *high_y;
  int32_t* top;  // the greatest key
};

// Bit j: block at + j and the box may overlap.
uint64_t touching(const Field& field, size_t at, const Box& box);
// Decays the boxes of a block by their overlap with `box` and updates the block's top; -> the number of dropped boxes.
uint32_t meet(const Field& field, size_t block, const Box& box, const Rule& rule);
// Sets one of 16 keys to kGone; -> the maximum of the 16.
int32_t drop(int32_t* keys, size_t lane);
// The maximum of n keys; n is a multiple of 16, not 0.
int32_t greatest(const int32_t* keys, size_t n);
// Bit j: keys[j] equals `key`; 16 keys.
uint32_t equal(const int32_t* keys, int32_t key);

// exp(t) for t <= 0, relative error 2e-7; 0 if the result is no normal float. 2^n exp(r), |r| <= ln 2 / 2, with the
// coefficients of Cephes' expf and no fused step.
constexpr float kLowest = -87.33654f;  // ln FLT_MIN
constexpr float kFloor = -88.0f;
constexpr float kLog2E = 1.44269504f;
constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer, which the low bits hold
constexpr float kLn2High = 0.693359375f, kLn2Low = -2.12194440e-4f;
constexpr float kFirst = 1.9875691500e-4f;
constexpr float kRest[] = {1.3981999507e-3f, 8.3334519073e-3f, 4.1665795894e-2f, 1.6666665459e-1f, 5.0000001201e-1f};

// Maps the order of scores to an order of integers; negative scores are mirrored. -0 becomes 0.
inline int32_t key_of(float score) {
  const float plain = score + 0.0f;
  int32_t bits;
  __builtin_memcpy(&bits, &plain, sizeof bits);
  return bits ^ ((bits >> 31) & INT32_MAX);
}

inline float score_of(int32_t key) {
  const int32_t bits = key ^ ((key >> 31) & INT32_MAX);
  float score;
  __builtin_memcpy(&score, &bits, sizeof score);
  return score;
}

// abcd -> 0a0b0c0d
inline uint32_t spread_bits(uint32_t x) {
  x = (x | x << 4) & 0x0F0F;
  x = (x | x << 2) & 0x3333;
  return (x | x << 1) & 0x5555;
}

// order[i]: the index of the i-th box along the curve. `cell` has room for n numbers, `start` for 4 n + 2. Any order is
// correct. With one box far away all others share one cell, and every pick then visits every block.
inline void sort_along_curve(const float* x0, const float* y0, const float* x1, const float* y1, size_t n,
                             uint32_t* order, uint32_t* cell, uint32_t* start) {
  if (n <= 2 * kBlock) {
    for (size_t i = 0; i < n; ++i) order[i] = static_cast<uint32_t>(i);
    return;
  }
  float low_x = FLT_MAX, low_y = FLT_MAX, high_x = -FLT_MAX, high_y = -FLT_MAX;
  for (size_t i = 0; i < n; ++i) {
    const float x = 0.5f * x0[i] + 0.5f * x1[i], y = 0.5f * y0[i] + 0.5f * y1[i];
    low_x = x < low_x ? x : low_x;
    low_y = y < low_y ? y : low_y;
    high_x = x > high_x ? x : high_x;
    high_y = y > high_y ? y : high_y;
  }
  uint32_t bits = 1;
  while (bits < 8 && (size_t{1} << 2 * bits) < n) ++bits;
  const double sides = static_cast<double>((1u << bits) - 1);
  const double wide = static_cast<double>(high_x) - low_x, tall = static_cast<double>(high_y) - low_y;
  const float scale_x = static_cast<float>(wide > 1e-30 ? sides / wide : 0.0);
  const float scale_y = static_cast<float>(tall > 1e-30 ? sides / tall : 0.0);
  const size_t cells = size_t{1} << 2 * bits;
  const float last = static_cast<float>(sides);
  for (size_t c = 0; c <= cells; ++c) start[c] = 0;
  for (size_t i = 0; i < n; ++i) {
    // in [0, last] despite rounding and overflow: an infinite difference times 0 is NaN, which compares false
    const float x = (0.5f * x0[i] + 0.5f * x1[i] - low_x) * scale_x, y = (0.5f * y0[i] + 0.5f * y1[i] - low_y) * scale_y;
    const uint32_t column = static_cast<uint32_t>(x < last ? x : last), row = static_cast<uint32_t>(y < last ? y : last);
    cell[i] = spread_bits(column) | spread_bits(row) << 1;
    ++start[cell[i] + 1];
  }
  for (size_t c = 0; c < cells; ++c) start[c + 1] += start[c];
  for (size_t i = 0; i < n; ++i) order[start[cell[i]]++] = static_cast<uint32_t>(i);
}

// Computes the bounding boxes and tops of the blocks of the first n slots; -> the blocks, padded to a multiple of 64.
inline size_t fence(const Field& f, size_t n) {
  const size_t used = (n + kBlock - 1) / kBlock, blocks = (used + 63) / 64 * 64;
  for (size_t i = n; i < used * kBlock; ++i) {
    f.x0[i] = f.y0[i] = kNowhereLow;
    f.x1[i] = f.y1[i] = kNowhereHigh;
    f.area[i] = 0.0f;
    f.key[i] = kGone;
    f.place[i] = INT32_MAX;
  }
  for (size_t b = 0; b < blocks; ++b) {
    f.low_x[b] = f.low_y[b] = kNowhereLow;
    f.high_x[b] = f.high_y[b] = kNowhereHigh;
    f.top[b] = kGone;
    if (b >= used) continue;
    for (size_t i = b * kBlock; i < (b + 1) * kBlock; ++i) {
      f.low_x[b] = f.x0[i] < f.low_x[b] ? f.x0[i] : f.low_x[b];
      f.low_y[b] = f.y0[i] < f.low_y[b] ? f.y0[i] : f.low_y[b];
      f.high_x[b] = f.x1[i] > f.high_x[b] ? f.x1[i] : f.high_x[b];
      f.high_y[b] = f.y1[i] > f.high_y[b] ? f.y1[i] : f.high_y[b];
      f.top[b] = f.key[i] > f.top[b] ? f.key[i] : f.top[b];
    }
  }
  return blocks;
}

// Moves the remaining boxes to the front, in the same order; -> their number.
inline size_t close_up(const Field& f, size_t n) {
  size_t to = 0;
  for (size_t i = 0; i < n; ++i) {
    if (f.key[i] == kGone) continue;
    f.x0[to] = f.x0[i];
    f.y0[to] = f.y0[i];
    f.x1[to] = f.x1[i];
    f.y1[to] = f.y1[i];
    f.area[to] = f.area[i];
    f.key[to] = f.key[i];
    f.place[to] = f.place[i];
    ++to;
  }
  return to;
}

// The slot with the lowest index among the boxes whose key is `best`, the top of some block.
inline size_t find(const Field& f, size_t blocks, int32_t best) {
  size_t slot = 0;
  int32_t lowest = INT32_MAX;
  for (size_t b = 0; b < blocks; b += kBlock)
    for (uint32_t tops = equal(f.top + b, best); tops; tops &= tops - 1) {
      const size_t begin = (b + static_cast<size_t>(__builtin_ctz(tops))) * kBlock;
      for (uint32_t keys = equal(f.key + begin, best); keys; keys &= keys - 1) {
        const size_t i = begin + static_cast<size_t>(__builtin_ctz(keys));
        if (f.place[i] < lowest) lowest = f.place[i], slot = i;
      }
    }
  return slot;
}

inline size_t run_race(const float* x0, const float* y0, const float* x1, const float* y1, const float* area,
                       const float* score, size_t n, int method, float iou_threshold, float sigma, float min_score,
                       size_t max_output, void* scratch, int32_t* kept, float* kept_scores) {
  if (n == 0 || max_output == 0) return 0;
  if (method == 0 && iou_threshold < 0) max_output = 1;  // an IoU of 0 is also over a negative threshold
  const size_t room = (n + 63) / 64 * 64, blocks_room = (room / kBlock + 63) / 64 * 64;
  float* floats = static_cast<float*>(scratch);
  int32_t* numbers = reinterpret_cast<int32_t*>(floats + 5 * room + 4 * blocks_room);
  float* bounds = floats + 5 * room;
  const Field f{floats, floats + room, floats + 2 * room, floats + 3 * room, floats + 4 * room, numbers, numbers + room,
                bounds, bounds + blocks_room, bounds + 2 * blocks_room, bounds + 3 * blocks_room,
                numbers + 2 * room};
  uint32_t* order = reinterpret_cast<uint32_t*>(numbers + 2 * room + blocks_room);
  sort_along_curve(x0, y0, x1, y1, n, order, order + room, order + 2 * room);
  for (size_t i = 0; i < n; ++i) {
    const uint32_t from = order[i];
    f.x0[i] = x0[from];
    f.y0[i] = y0[from];
    f.x1[i] = x1[from];
    f.y1[i] = y1[from];
    f.area[i] = area[from];
    f.key[i] = key_of(score[from]);
    f.place[i] = static_cast<int32_t>(from);
  }
  const float steepness = -1.0f / sigma;
  const Rule rule{method, iou_threshold, steepness < -FLT_MAX ? -FLT_MAX : steepness, min_score};

  size_t places = n, alive = n, count = 0, blocks = fence(f, n);
  while (true) {
    const int32_t best = greatest(f.top, blocks);
    if (best == kGone) return count;
    const size_t i = find(f, blocks, best);
    kept[count] = f.place[i];
    kept_scores[count] = score_of(best);
    if (++count == max_output) return count;
    const Box box{f.x0[i], f.y0[i], f.x1[i], f.y1[i], f.area[i]};
    const size_t block = i / kBlock;
    f.top[block] = drop(f.key + block * kBlock, i % kBlock);
    --alive;
    for (size_t at = 0; at < blocks; at += 64)
      for (uint64_t met = touching(f, at, box); met; met &= met - 1)
        alive -= meet(f, at + static_cast<size_t>(__builtin_ctzll(met)), box, rule);
    if (alive < places / 2 && places > 2 * kBlock) {
      places = close_up(f, places);
      blocks = fence(f, places);
    }
  }
}

}  // namespace
}  // namespace calmclip

#define CALMCLIP_SOFT_NMS(isa)                                                                                      \
  extern "C" SoftNms soft_nms_##isa;                                                                                \
  size_t soft_nms_##isa(const float* x0, const float* y0, const float* x1, const float* y1, const float* area,      \
                        const float* score, size_t n, int method, float iou_threshold, float sigma,                 \
                        float min_score, size_t max_output, void* scratch, int32_t* kept, float* kept_scores) {     \
    return run_race(x0, y0, x1, y1, area, score, n, method, iou_threshold, sigma, min_score, max_output, scratch,   \
                    kept, kept_scores);                                                                             \
  }
