// y[r, :] = clamp((zeta - gamma) * softmax(x[r, :]) + gamma, 0, 1). x and y are row-major [rows, cols], the same memory
// or disjoint, aligned to a float. gamma <= 0 <= 1 <= zeta; 0 and 1 are plain softmax. rows = 0 or cols = 0 reads and
// writes nothing.
//
// -inf counts as the lowest finite float, so a row with only masked values is uniform for either mask value. A row that
// holds NaN or +inf becomes NaN. exp has a relative error of at most 2e-7. A result under exp(-87.7), the smallest
// normal float, times the row maximum is exactly 0. Subnormal inputs may read as 0: the x86 kernels flush subnormals
// while they run.
//
// Three forms of one function; softmax_forms.h chooses.
//   softmax_reload     max; exp stored and summed; the stored values scaled.      3 reads, 2 writes, one exp.
//                      AVX-512 keeps a row of up to 320 in registers: 1 read, 1 write.
//   softmax_recompute  max; exp summed; exp again, scaled.                        3 reads, 1 write, two exps.
//   softmax_two_pass   sum of exp as pairs (m, n) of value m * 2^n, which cannot overflow and need no maximum;
//                      exp again, scaled.                                         2 reads, 1 write, two exps.
//                      Source: Dukhan and Ablavatski 2020 (arXiv 2001.04438), algorithm 3. Exact for rows whose maximum
//                      is within -9e5 .. 1e6; softmax_recompute computes other rows.
// Sums of more than 128 terms a lane continue in double, so the error does not grow with the row.
//
// `stream`: the last pass of softmax_recompute and softmax_two_pass bypasses the caches, for an output that they cannot
// hold. Not if x == y, because its lines are in the caches already. softmax_reload ignores it, because its last pass
// writes the lines that it has just read.
#pragma once

#include <cstddef>

namespace calmclip {

using SoftmaxRows = void(const float* x, float* y, size_t rows, size_t cols, float gamma, float zeta, bool stream);

}  // namespace calmclip
