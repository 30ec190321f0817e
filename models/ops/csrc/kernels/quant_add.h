// The sum of two uint8 tensors: QuantAdd of models/ops/spec.py.
#pragma once

#include <cstddef>
#include <cstdint>

namespace calmclip {

inline constexpr size_t kAddBlock = 64;

// The index of a column's constants within its block. Constants of every fourth column are adjacent, because a kernel
// takes bytes out of 32-bit words.
inline constexpr size_t add_place(size_t column) {
  return column / kAddBlock * kAddBlock + column % 4 * (kAddBlock / 4) + column % kAddBlock / 4;
}

// `rows` rows of `width` columns, `step` apart: y = clip(rint(fma(a, a_factor, fma(b, b_factor, start))) + zero, 0,
// 255), half to even. The rounded number must fit int32. y may have the memory of a or b.
// tests/models/ops/test_quant_add.py declares the same layout.
struct AddBlock {
  const uint8_t *a, *b;
  uint8_t* y;
  size_t rows, step, width;                  // 1 <= width <= kAddBlock
  const float *a_factor, *b_factor, *start;  // kAddBlock of each for every width, at the indices of `add_place`
  const int32_t* zero;
};

using QuantAdd = void(const AddBlock& block);

}  // namespace calmclip
