// One head of attention in bytes, for some of its query rows (models/ops/spec.py: QUANT_ATTENTION):
//
//   logits[t, s] = sum_i (q[t, i] - q_zero) (k[s, i] - 128), exact in int32;  x = logits * scale + mask
//   p = min(rint(clip((zeta - gamma) softmax(x) + gamma, 0, 1) / p_scale), 255);  step = p_scale
//   or, where p_scale is 0, p[t, s] = rint(255 exp(x[t, s] - max_s x[t, s]));     step[t] = 1 / sum_s p[t, s]
//   y[t, i] = clip(rint(sum_s p[t, s] (v[s, i] - 128) * step * v_scale / y_scale[i]) + y_zero[i], 0, 255)
//
// Sums of p are exact; what is rounded is rounded half to even.
//
// -inf and what float32 does not hold count as the lowest float, so a row of nothing but masks is uniform. NaN in the
// mask counts as hidden; +inf, and scales whose product float32 does not hold, give some bytes.
// The scalar form is the oracle of the others: a p next to a tie may be a step off there, for exp has a relative error
// of 4e-6 in them.
//
// Layout of the vector forms (quant_attention_body.inc): a lane is a query row, 16 or 8 at a time, so that maximum, sum
// and mask need nothing across lanes, and a key's or value's numbers are broadcast from memory, which costs nothing
// beside the products. So k is copied as it lies, v in groups of 4 keys, q and y are transposed.
#pragma once

#include <cstddef>
#include <cstdint>

namespace calmclip {

// tests/models/ops/test_quant_attention.py lays it out the same.
struct AttentionHead {
  const uint8_t *q, *k, *v;  // the head's first column of the first row
  uint8_t* y;
  size_t q_step, k_step, v_step, y_step;  // from row to row
  size_t rows, keys, dims;                // keys, dims at least 1
  const float* mask;                      // or null; of row t and key s at mask[t * mask_row + s * mask_key]
  size_t mask_row, mask_key;
  // or null; for each row, seen_step apart: the mask is 0 for so many keys and hides the rest; 0: it has to be read.
  // Vector forms heed it.
  const uint32_t* seen;
  size_t seen_step;
  const float* y_scale;
  const uint8_t* y_zero;
  size_t y_scale_step, y_zero_step;  // 1, or 0: one for all
  float scale, v_scale, p_scale, gamma, zeta;
  uint8_t q_zero;
};

inline constexpr size_t kMostKeys = 65536, kMostDims = 32768;  // beyond, sums leave int32

// `scratch`: attention_scratch(keys, dims) bytes, aligned to 64.
using QuantAttention = void(const AttentionHead& head, void* scratch);

inline constexpr size_t attention_scratch(size_t keys, size_t dims) {
  const size_t k = (dims + 31) / 32 * 64 * keys, v = (keys + 3) * (dims + 3) * 2, row = (keys + 3) * 64;
  const size_t columns = (dims + 63) / 64 * 64;
  // k, v, logits, mask, p and sums of k, q and y transposed, what quantizes a column, room to align each
  return k + v + 3 * row + columns * (2 * 16 + 16) + 16 * 64 + 1024;
}

// The number `seen` holds for a row of the mask. A key is hidden by what is at most `hides` < 0.
uint32_t attention_seen(const float* mask, size_t keys, float hides);

// The greatest logit there may be, in absolute value, is this times scale.
inline constexpr double attention_reach(size_t dims) { return 255.0 * 128.0 * static_cast<double>(dims); }

}  // namespace calmclip
