// Greedy suppression that decays the scores of overlapping boxes. Source: Bodla et al. 2017 (arXiv 1704.04503).
#pragma once

#include <cstddef>
#include <cstdint>

namespace calmclip {

// Boxes of one class: take the best, decay those that overlap it, drop what falls under `min_score` or gets weight 0.
//
//   x0, y0, x1, y1, area  [n]; finite; a box whose area is no normal, finite float is FLT_MAX, FLT_MAX,
//                         -FLT_MAX, -FLT_MAX, 0: it overlaps nothing
//   score                 [n]; no NaN, each at least `min_score`
//   method                0 hard, 1 linear, else gaussian
//   scratch               soft_nms_scratch(n) bytes, aligned to 64
//   kept, kept_scores     room for min(n, max_output): places in the input, decayed scores, best first
//   returns how many
//
// IoU is one float32 division of float32 areas, and is compared with the threshold as such; scores decay in the order
// in which the boxes are taken, each step rounded to float32; no step is fused. So every instruction set gives the
// very same bits. Ties go to the lower place. n < 2^31; n = 0 and max_output = 0 give 0.
using SoftNms = size_t(const float* x0, const float* y0, const float* x1, const float* y1, const float* area,
                       const float* score, size_t n, int method, float iou_threshold, float sigma, float min_score,
                       size_t max_output, void* scratch, int32_t* kept, float* kept_scores);

constexpr size_t soft_nms_scratch(size_t n) { return 64 * ((n + 63) / 64 * 64) + 4096; }

// One image, as the operator's inputs hold it: boxes [n, 4] of any floats, scores [n] of anything but NaN, classes [n]
// (read when per_class is not 0). kept and kept_scores have room for min(n, max_output). Returns how many.
// Boxes of one class race among themselves; the races are merged by the score of their next box, lower index first:
// that is the order of one race of all, since a box of one class changes no score of another.
// Throws std::bad_alloc.
using SoftNmsImage = size_t(const float* boxes, const float* scores, const int64_t* classes, size_t n, int method,
                            int per_class, float iou_threshold, float sigma, float min_score, size_t max_output,
                            int64_t* kept, float* kept_scores);

}  // namespace calmclip
