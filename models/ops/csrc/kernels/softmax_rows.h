// y[r, :] = clamp((zeta - gamma) * softmax(x[r, :]) + gamma, 0, 1);  x, y row-major [rows, cols], may be the same, else
// do not overlap; neither need be aligned to more than a float. gamma <= 0 <= 1 <= zeta; 0 and 1 are plain softmax.
// rows = 0 or cols = 0 reads and writes nothing.
//
// -inf counts as the lowest finite float, so a row of nothing but masks is uniform, whichever the mask.
// A row that holds NaN or +inf comes out as NaN.
// exp has a relative error of at most 2e-7. What falls under exp(-87.7), the smallest normal float, times the row's
// greatest is exactly 0; subnormal inputs may read as 0. (x86 kernels flush subnormals while they run.)
//
// Three forms of one function; softmax_forms.h says which is taken when.
//   softmax_reload     max; exp stored and summed; the scaling of what was stored. 3 reads, 2 writes, one exp.
//                      AVX-512 holds a row of up to 320 in registers: 1 read, 1 write.
//   softmax_recompute  max; exp summed; exp again, scaled.                         3 reads, 1 write, two exps.
//   softmax_two_pass   sum of exp as pairs (m, n) of value m * 2^n, which cannot overflow and so need no maximum;
//                      exp again, scaled.                                          2 reads, 1 write, two exps.
//                      Source: Dukhan and Ablavatski 2020 (arXiv 2001.04438), algorithm 3. Exact for rows whose greatest
//                      lies within -9e5 .. 1e6; it hands others to softmax_recompute.
// Sums of more than 128 terms a lane go on in double, so the error does not grow with the row.
//
// `stream`: the last pass of softmax_recompute and softmax_two_pass stores past the caches, for an output that they do
// not hold. Not done where x == y, whose lines are in the caches already; softmax_reload, whose last pass writes what it
// has just read, ignores it.
#pragma once

#include <cstddef>

namespace calmclip {

using SoftmaxRows = void(const float* x, float* y, size_t rows, size_t cols, float gamma, float zeta, bool stream);

}  // namespace calmclip
