// The sum of two tensors of bytes: QuantAdd of models/ops/spec.py.
#pragma once

#include <cstddef>
#include <cstdint>

namespace calmclip {

inline constexpr size_t kAddBlock = 64;

// Where the numbers of a column lie within those of its block: every fourth column's one behind the other, for a kernel
// takes bytes out of words of four.
inline constexpr size_t add_place(size_t column) {
  return column / kAddBlock * kAddBlock + column % 4 * (kAddBlock / 4) + column % kAddBlock / 4;
}

// Of `width` columns, `rows` rows that are `step` apart: y = clip(rint(fma(a, a_factor, fma(b, b_factor, start))) + zero,
// 0, 255), half to even. What is rounded lies within what int32 holds. y may lie where a or b does.
// tests/models/ops/test_quant_add.py lays it out the same.
struct AddBlock {
  const uint8_t *a, *b;
  uint8_t* y;
  size_t rows, step, width;                  // width is 1 to kAddBlock
  const float *a_factor, *b_factor, *start;  // kAddBlock of each, whatever the width, by their places
  const int32_t* zero;
};

using QuantAdd = void(const AddBlock& block);

}  // namespace calmclip
