// y[i] = table[x[i]]: QuantLookup of models/ops/spec.py.
#pragma once

#include <cstddef>
#include <cstdint>

namespace calmclip {

// x and y: `count` bytes, the same memory or disjoint; table: 256 bytes.
using QuantLookup = void(const uint8_t* x, uint8_t* y, size_t count, const uint8_t* table);

}  // namespace calmclip
