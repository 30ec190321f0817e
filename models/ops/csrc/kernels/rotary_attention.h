// Attention in float32 of the query heads that share one head of keys and values: RotaryAttention of models/ops/spec.py.
//
//   a row of q or k: x [/ sqrt(mean of x^2 + epsilon) * weight] [* cos + swap(x) * sin]; swap exchanges the halves
//   logits = q k^T, [cap tanh(logits)], + mask;  y = clip((zeta - gamma) softmax(logits) + gamma, 0, 1) v
//
// A lane is a query row, 16, 8 or 4 rows at a time, as in quant_attention.h: maximum, sum and mask need no operation
// across lanes, and the numbers of a key or value are broadcast from memory. A row's sums have one order for any number
// of lanes, and a product is added with one rounding, so every instruction set gives the same bits. Memory is linear in
// the number of keys: the rotated keys, and the logits of one block of rows.
#pragma once

#include <cstddef>
#include <cstdint>

namespace calmclip {

// The keys that one row of the mask shows: none before `first`, none from `last` on. `plain`: all between, at 0. A row
// that hides all keys shows all.
struct Shown {
  uint32_t first, last, plain;
};

inline constexpr float kHides = -1e4f;  // a mask at most this hides its key
inline constexpr float kLowest = -1e30f;  // counts as this

// tests/models/ops/test_rotary_attention.py declares the same layout.
struct AttentionGroup {
  const float *q, *k, *v;  // the first number of the first row; query heads follow one another
  float* y;
  size_t q_step, k_step, v_step, y_step;  // from row to row
  size_t rows, keys, dims, heads;         // heads: of q; all at least 1
  const float *q_weight, *k_weight;       // dims numbers, or null: no norm
  const float *q_cos, *q_sin, *k_cos, *k_sin;  // dims numbers for each row, or null: no rotation; dims is even then
  const float* mask;  // or null; the mask of row t and key s is mask[t * mask_row + s]
  size_t mask_row;
  const Shown* shown;  // of each row of the mask, shown_step apart; with a mask
  size_t shown_step;
  float epsilon, cap, gamma, zeta;  // cap 0: none
};

// `scratch`: rotary_scratch(keys, dims) floats, aligned to 64 bytes.
using RotaryAttention = void(const AttentionGroup& group, float* scratch);

inline constexpr size_t rotary_scratch(size_t keys, size_t dims) { return (keys + 16) * (dims + 16) + 16 * (2 * dims + 32); }

}  // namespace calmclip
