// y[r, :] = clamp((zeta - gamma) * softmax(x[r, :]) + gamma, 0, 1);  x, y row-major [rows, cols], may be the same.
// -inf counts as the lowest finite float, so a row of nothing but masks is uniform, whichever the mask.
// A row that holds NaN or +inf comes out as NaN.
#pragma once

#include <cstddef>

namespace calmclip {

using SoftmaxRows = void(const float* x, float* y, size_t rows, size_t cols, float gamma, float zeta);

}  // namespace calmclip
