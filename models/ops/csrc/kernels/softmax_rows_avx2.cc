#include "softmax_rows.h"

#include <cfloat>
#include <cmath>

namespace calmclip {

extern "C" SoftmaxRows softmax_reload_avx2;

// Three passes: the maximum; exp and its sum, stored; the scaling of what was stored.
void softmax_reload_avx2(const float* x, float* y, size_t rows, size_t cols, float gamma, float zeta) {
  for (size_t r = 0; r < rows; ++r, x += cols, y += cols) {
    float top = -FLT_MAX, sum = 0;
    for (size_t i = 0; i < cols; ++i) top = x[i] > top ? x[i] : top;
    for (size_t i = 0; i < cols; ++i) sum += y[i] = expf((x[i] < -FLT_MAX ? -FLT_MAX : x[i]) - top);
    for (size_t i = 0; i < cols; ++i) {
      float p = y[i] / sum * (zeta - gamma) + gamma;
      y[i] = p < 0 ? 0 : p > 1 ? 1 : p;
    }
  }
}

}  // namespace calmclip
