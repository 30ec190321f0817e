// y[i] = table[x[i]]: QuantLookup of models/ops/spec.py.
#pragma once

#include <cstddef>
#include <cstdint>

namespace calmclip {

// x and y: `count` bytes, the same or apart; table: 256.
using QuantLookup = void(const uint8_t* x, uint8_t* y, size_t count, const uint8_t* table);

}  // namespace calmclip
