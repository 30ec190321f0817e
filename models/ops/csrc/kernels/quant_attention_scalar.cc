#include "quant_attention.h"

#include <cfloat>
#include <cmath>

#include "old_exp.h"

namespace calmclip {

extern "C" QuantAttention quant_attention_scalar;

namespace {

// Rounds to 0 .. 255; NaN becomes 0.
int32_t steps(double x) { return !(x > 0) ? 0 : x > 255 ? 255 : static_cast<int32_t>(std::nearbyint(x)); }

}  // namespace

// Row by row, as quant_attention.h defines it. exp is in double, so a probability is as accurate as float32 allows.
void quant_attention_scalar(const AttentionHead& head, void* scratch) {
  auto* logits = static_cast<float*>(scratch);
  auto* p = reinterpret_cast<int32_t*>(logits + head.keys);
  auto* sums = p + head.keys;
  for (size_t t = 0; t < head.rows; ++t) {
    const uint8_t* q = head.q + t * head.q_step;
    float top = -FLT_MAX;
    for (size_t s = 0; s < head.keys; ++s) {
      const uint8_t* k = head.k + s * head.k_step;
      int32_t sum = 0;
      for (size_t i = 0; i < head.dims; ++i) sum += (q[i] - head.q_zero) * (k[i] - 128);
      float x = static_cast<float>(sum) * head.scale;
      if (head.mask) x += head.mask[t * head.mask_row + s * head.mask_key];
      logits[s] = x > -FLT_MAX ? x : -FLT_MAX;  // also for NaN
      top = logits[s] > top ? logits[s] : top;
    }
    const auto power = [&](size_t s) { return std::exp(double{logits[s]} - double{top}); };
    double sum = 0, step = head.p_scale;
    for (size_t s = 0; s < head.keys; ++s) sum += power(s);
    for (size_t s = 0; s < head.keys; ++s) {
      if (head.p_scale == 0) {
        p[s] = steps(255 * power(s));
      } else {
        const double wide = (double{head.zeta} - double{head.gamma}) * (power(s) / sum) + double{head.gamma};
        p[s] = steps((wide < 1 ? wide : 1) / double{head.p_scale});
      }
    }
    if (head.p_scale == 0) {
      int32_t all = 0;
      for (size_t s = 0; s < head.keys; ++s) all += p[s];
      step = 1 / double(all);
    }
    for (size_t i = 0; i < head.dims; ++i) sums[i] = 0;
    for (size_t s = 0; s < head.keys; ++s) {
      const uint8_t* v = head.v + s * head.v_step;
      if (p[s])
        for (size_t i = 0; i < head.dims; ++i) sums[i] += p[s] * (v[i] - 128);
    }
    uint8_t* y = head.y + t * head.y_step;
    for (size_t i = 0; i < head.dims; ++i) {
      const double value = static_cast<double>(sums[i]) * step * double{head.v_scale};
      const double rounded = std::nearbyint(value / double{head.y_scale[i * head.y_scale_step]});
      y[i] = static_cast<uint8_t>(steps(rounded + head.y_zero[i * head.y_zero_step]));
    }
  }
}

}  // namespace calmclip
