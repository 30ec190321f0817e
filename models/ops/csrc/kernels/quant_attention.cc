#include "quant_attention.h"

#include <cstring>

namespace calmclip {

// Compared as bits, because compilers vectorize integer loops. Of two negative floats the lower one has the larger
// bits.
uint32_t attention_seen(const float* mask, size_t keys, float hides) {
  const auto bits = [&](size_t i) {
    int32_t value;
    std::memcpy(&value, mask + i, sizeof value);
    return value;
  };
  size_t seen = 0;
  while (seen < keys && (bits(seen) & INT32_MAX) == 0) ++seen;
  int32_t least;
  std::memcpy(&least, &hides, sizeof least);
  constexpr int32_t kInfinity = static_cast<int32_t>(0xff800000);
  bool any = false;
  for (size_t i = seen; i < keys; ++i) any |= (bits(i) < least) | (bits(i) > kInfinity);
  return any ? 0 : static_cast<uint32_t>(seen);
}

}  // namespace calmclip
