// Greedy suppression that decays the scores of overlapping boxes. Source: Bodla et al. 2017 (arXiv 1704.04503).
#pragma once

#include <cstddef>
#include <cstdint>

namespace calmclip {

// The race: boxes of one class. Take the best, decay those that overlap it, drop those under `min_score` or of weight
// 0.
//
//   x0, y0, x1, y1, area  [n]; finite; a box whose area is no normal, finite float is FLT_MAX, FLT_MAX,
//                         -FLT_MAX, -FLT_MAX, 0: it overlaps nothing
//   score                 [n]; no NaN, each at least `min_score`
//   method                0 hard, 1 linear, else gaussian
//   scratch               soft_nms_scratch(n) bytes, aligned to 64
//   kept, kept_scores     room for min(n, max_output): indices into the input, decayed scores, best first
//   returns               the number of kept boxes
//
// IoU is one float32 division of float32 areas, and this float32 is compared with the threshold. Scores decay in the
// order in which the boxes are taken. Each step is rounded to float32; no step is fused. So every instruction set gives
// the same bits. Ties go to the lower index. n < 2^31; n = 0 and max_output = 0 give 0.
using SoftNms = size_t(const float* x0, const float* y0, const float* x1, const float* y1, const float* area,
                       const float* score, size_t n, int method, float iou_threshold, float sigma, float min_score,
                       size_t max_output, void* scratch, int32_t* kept, float* kept_scores);

constexpr size_t soft_nms_scratch(size_t n) { return 64 * ((n + 63) / 64 * 64) + 4096; }

// One image in the layout of the operator's inputs: boxes [n, 4] of any floats, scores [n] of anything but NaN, classes
// [n] (read if per_class is not 0). kept and kept_scores have room for min(n, max_output). Returns the number of kept
// boxes. Each class has a race of its own. The races are merged by the score of their next box, lower index first. That
// is the order of one race of all boxes, because a box of one class changes no score of another. Throws std::bad_alloc.
using SoftNmsImage = size_t(const float* boxes, const float* scores, const int64_t* classes, size_t n, int method,
                            int per_class, float iou_threshold, float sigma, float min_score, size_t max_output,
                            int64_t* kept, float* kept_scores);

}  // namespace calmclip
