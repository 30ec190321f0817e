// One attention head on bytes, for some of its query rows (models/ops/spec.py: QUANT_ATTENTION):
//
//   logits[t, s] = sum_i (q[t, i] - q_zero) (k[s, i] - 128), exact in int32;  x = logits * scale + mask
//   p = min(rint(clip((zeta - gamma) softmax(x) + gamma, 0, 1) / p_scale), 255);  step = p_scale
//   or, if p_scale is 0, p[t, s] = rint(255 exp(x[t, s] - max_s x[t, s]));        step[t] = 1 / sum_s p[t, s]
//   y[t, i] = clip(rint(sum_s p[t, s] (v[s, i] - 128) * step * v_scale / y_scale[i]) + y_zero[i], 0, 255)
//
// Sums of p are exact; rounding is half to even.
//
// -inf and values below the range of float32 count as the lowest float, so a row with only masked keys is uniform. NaN
// in the mask counts as hidden. +inf, and scales whose product overflows float32, give unspecified bytes. The scalar
// version is the oracle of the others. In those, a p next to a tie may be one step off, because their exp has a
// relative error of 4e-6.
//
// Layout of the vector versions (quant_attention_body.inc): a lane is a query row, 16 or 8 rows at a time. Maximum, sum
// and mask then need no operation across lanes. The numbers of a key or value are broadcast from memory, which costs
// nothing beside the products. So k is copied in its own order, v in groups of 4 keys, and q and y are transposed.
#pragma once

#include <cstddef>
#include <cstdint>

namespace calmclip {

// tests/models/ops/test_quant_attention.py declares the same layout.
struct AttentionHead {
  const uint8_t *q, *k, *v;  // the head's first column of the first row
  uint8_t* y;
  size_t q_step, k_step, v_step, y_step;  // from row to row
  size_t rows, keys, dims;                // keys and dims are at least 1
  const float* mask;                      // or null; the mask of row t and key s is mask[t * mask_row + s * mask_key]
  size_t mask_row, mask_key;
  // Or null. For each row, seen_step apart: the mask is 0 for this many keys and hides the others. 0: read the mask.
  // Only the vector versions use it.
  const uint32_t* seen;
  size_t seen_step;
  const float* y_scale;
  const uint8_t* y_zero;
  size_t y_scale_step, y_zero_step;  // 1, or 0 if one number serves all
  float scale, v_scale, p_scale, gamma, zeta;
  uint8_t q_zero;
};

inline constexpr size_t kMostKeys = 65536, kMostDims = 32768;  // above these, sums overflow int32

// `scratch`: attention_scratch(keys, dims) bytes, aligned to 64.
using QuantAttention = void(const AttentionHead& head, void* scratch);

inline constexpr size_t attention_scratch(size_t keys, size_t dims) {
  const size_t k = (dims + 31) / 32 * 64 * keys, v = (keys + 3) * (dims + 3) * 2, row = (keys + 3) * 64;
  const size_t columns = (dims + 63) / 64 * 64;
  // k, v, logits, mask, p and sums of k, q and y transposed, the quantizer of each column, room to align each
  return k + v + 3 * row + columns * (2 * 16 + 16) + 16 * 64 + 1024;
}

// The value of `seen` for one row of the mask. A key is hidden if its mask is at most `hides` < 0.
uint32_t attention_seen(const float* mask, size_t keys, float hides);

// The largest possible absolute value of a logit is this times scale.
inline constexpr double attention_reach(size_t dims) { return 255.0 * 128.0 * static_cast<double>(dims); }

}  // namespace calmclip
