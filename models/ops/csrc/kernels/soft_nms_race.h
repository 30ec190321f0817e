// The race of soft_nms.h, the same text for every instruction set: included by soft_nms_<isa>.cc after it has defined
//
//   uint64_t touching(const Picks&, size_t at, const Box&)   bit j: pick at + j and the box share a positive area
//   bool weigh(const Rule&, const float* shared, const float* whole, size_t n, float* weight)
//                                                            n a multiple of 16; whether some weight is 0
//   int32_t put(int32_t* keys, size_t n, size_t at, int32_t key)   keys[at] = key; the greatest of keys[0, n)
//   size_t first(const int32_t* keys, size_t n, int32_t key)       the lowest place that holds key; n: multiples of 16
//
// Everything is in an anonymous namespace: each file has its own, compiled for its own processor.
//
// A textbook race updates every box after every pick. This one is lazy. A score can only fall, so an old score is an
// upper bound; the box with the greatest bound is brought up to date against the picks it has not met yet, and is
// taken if it still is the best. The boxes are the same, in the same order, with the same products; but a box is
// looked at only when its turn comes, the search for the best is a tree of two levels, and nothing but comparisons is
// spent on pairs that do not touch. Scores below 0 rise when they decay: they are brought up to date after each pick.
#pragma once

#include "soft_nms.h"

#include <cfloat>
#include <cmath>
#include <cstring>

namespace calmclip {
namespace {

constexpr int32_t kGone = INT32_MIN;  // below the key of -inf
constexpr size_t kGroup = 32;         // keys under one node of the tree
constexpr size_t kBuffer = 256;       // touching pairs that are weighed together, at most

struct Box {
  float x0, y0, x1, y1, area;
};

// The boxes taken so far, in order, padded to a multiple of 64 with boxes that touch nothing.
struct Picks {
  float *x0, *y0, *x1, *y1, *area;
};

struct Rule {
  int method;
  float threshold;
  float steepness;  // -1 / sigma
};

uint64_t touching(const Picks& picks, size_t at, const Box& box);
bool weigh(const Rule& rule, const float* shared, const float* whole, size_t n, float* weight);
int32_t put(int32_t* keys, size_t n, size_t at, int32_t key);
size_t first(const int32_t* keys, size_t n, int32_t key);

// exp(t) for t <= 0, relative error 2e-7; 0 where it is no normal float. Cephes' polynomial, without fused steps, and
// the constants for all: 2^n exp(r), |r| <= ln 2 / 2.
constexpr float kLowest = -87.33654f;  // ln FLT_MIN
constexpr float kFloor = -88.0f;
constexpr float kLog2E = 1.44269504f;
constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding it rounds to a whole number, found in the low bits
constexpr float kLn2High = 0.693359375f, kLn2Low = -2.12194440e-4f;
constexpr float kFirst = 1.9875691500e-4f;
constexpr float kRest[] = {1.3981999507e-3f, 8.3334519073e-3f, 4.1665795894e-2f, 1.6666665459e-1f, 5.0000001201e-1f};

// Order of floats as order of integers; -0 and 0 are equal.
inline int32_t key_of(float score) {
  const float plain = score + 0.0f;
  int32_t bits;
  std::memcpy(&bits, &plain, sizeof bits);
  return bits < 0 ? bits ^ INT32_MAX : bits;
}

struct Race {
  const float *x0, *y0, *x1, *y1, *area;
  float* score;
  Rule rule;
  float min_score;
  Picks picks;
  size_t count;  // picks
  uint32_t* seen;

  // Box i meets the picks it has not met; false: it goes.
  bool update(size_t i) {
    const Box box{x0[i], y0[i], x1[i], y1[i], area[i]};
    const size_t from = seen[i];
    seen[i] = static_cast<uint32_t>(count);
    alignas(64) float shared[kBuffer], whole[kBuffer];
    size_t hits = 0;
    for (size_t at = from & ~size_t{63}; at < count; at += 64) {
      uint64_t touched = touching(picks, at, box);
      if (at < from) touched &= ~uint64_t{0} << (from - at);
      while (touched) {
        const size_t j = at + static_cast<size_t>(__builtin_ctzll(touched));
        touched &= touched - 1;
        const float left = picks.x0[j] > box.x0 ? picks.x0[j] : box.x0;
        const float top = picks.y0[j] > box.y0 ? picks.y0[j] : box.y0;
        const float right = picks.x1[j] < box.x1 ? picks.x1[j] : box.x1;
        const float bottom = picks.y1[j] < box.y1 ? picks.y1[j] : box.y1;
        shared[hits] = (right - left) * (bottom - top);
        whole[hits] = (picks.area[j] + box.area) - shared[hits];
        ++hits;
      }
      if (hits > kBuffer - 64 || (hits && rule.method == 0)) {
        if (!decay(i, shared, whole, hits)) return false;
        hits = 0;
      }
    }
    return hits == 0 || decay(i, shared, whole, hits);
  }

  bool decay(size_t i, float* shared, float* whole, size_t hits) {
    const size_t padded = (hits + 15) & ~size_t{15};
    for (size_t h = hits; h < padded; ++h) shared[h] = 0.0f, whole[h] = 1.0f;
    alignas(64) float weight[kBuffer];
    if (weigh(rule, shared, whole, padded, weight)) return false;
    float now = score[i];
    for (size_t h = 0; h < hits; ++h) now *= weight[h];
    score[i] = now;
    return now >= min_score;
  }

  void take(size_t i) {
    if (count % 64 == 0)
      for (size_t j = count; j < count + 64; ++j) {
        picks.x0[j] = picks.y0[j] = FLT_MAX;
        picks.x1[j] = picks.y1[j] = -FLT_MAX;
        picks.area[j] = 0.0f;
      }
    picks.x0[count] = x0[i];
    picks.y0[count] = y0[i];
    picks.x1[count] = x1[i];
    picks.y1[count] = y1[i];
    picks.area[count] = area[i];
    ++count;
  }
};

inline size_t run_race(const float* x0, const float* y0, const float* x1, const float* y1, const float* area,
                       float* score, size_t n, int method, float iou_threshold, float sigma, float min_score,
                       size_t max_output, void* scratch, int32_t* kept, float* kept_scores) {
  if (method == 0 && iou_threshold < 0 && max_output > 1) max_output = 1;  // an IoU of 0 is over it, too
  const size_t padded = (n + 63) / 64 * 64, groups = padded / kGroup, nodes = (groups + 15) / 16 * 16;
  float* floats = static_cast<float*>(scratch);
  int32_t* keys = reinterpret_cast<int32_t*>(floats + 5 * padded);
  int32_t* tops = keys + padded;
  const float steepness = -1.0f / sigma;
  Race race{x0, y0, x1, y1, area, score, {method, iou_threshold, steepness < -FLT_MAX ? -FLT_MAX : steepness},
            min_score,
            {floats, floats + padded, floats + 2 * padded, floats + 3 * padded, floats + 4 * padded},
            0,
            reinterpret_cast<uint32_t*>(tops + nodes)};
  size_t below = 0;  // scores under 0
  for (size_t i = 0; i < n; ++i) {
    keys[i] = key_of(score[i]);
    below += score[i] < 0;
    race.seen[i] = 0;
  }
  for (size_t i = n; i < padded; ++i) keys[i] = kGone;
  for (size_t g = 0; g < groups; ++g) {
    int32_t top = kGone;
    for (size_t i = g * kGroup; i < (g + 1) * kGroup; ++i) top = keys[i] > top ? keys[i] : top;
    tops[g] = top;
  }
  for (size_t g = groups; g < nodes; ++g) tops[g] = kGone;

  int32_t best = nodes ? put(tops, nodes, 0, tops[0]) : kGone;
  const auto change = [&](size_t i, int32_t key) {
    const size_t g = i / kGroup;
    best = put(tops, nodes, g, put(keys + g * kGroup, kGroup, i % kGroup, key));
  };
  size_t fresh = 0;  // picks that all scores under 0 have met
  while (best != kGone && race.count < max_output) {
    if (below && best <= 0 && fresh < race.count) {
      fresh = race.count;
      for (size_t i = 0; i < n; ++i)
        if (keys[i] < 0 && keys[i] != kGone) change(i, race.update(i) ? key_of(score[i]) : kGone);
      continue;
    }
    const size_t g = first(tops, nodes, best);
    const size_t i = g * kGroup + first(keys + g * kGroup, kGroup, best);
    if (!race.update(i)) {
      change(i, kGone);
    } else if (const int32_t key = key_of(score[i]); key != best) {
      change(i, key);
    } else {
      kept[race.count] = static_cast<int32_t>(i);
      kept_scores[race.count] = score[i];
      race.take(i);
      change(i, kGone);
    }
  }
  return race.count;
}

}  // namespace
}  // namespace calmclip

#define CALMCLIP_SOFT_NMS(isa)                                                                                        \
  extern "C" calmclip::SoftNms soft_nms_##isa;                                                                        \
  size_t soft_nms_##isa(const float* x0, const float* y0, const float* x1, const float* y1, const float* area,        \
                        float* score, size_t n, int method, float iou_threshold, float sigma, float min_score,        \
                        size_t max_output, void* scratch, int32_t* kept, float* kept_scores) {                        \
    return run_race(x0, y0, x1, y1, area, score, n, method, iou_threshold, sigma, min_score, max_output, scratch,     \
                    kept, kept_scores);                                                                               \
  }
