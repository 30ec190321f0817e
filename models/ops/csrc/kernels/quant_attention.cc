#include "quant_attention.h"

#include <cstring>

namespace calmclip {

// Compared as bits, which loops of integers do many at a time: of two negative floats the lower has the greater bits.
uint32_t attention_seen(const float* mask, size_t keys, float hides) {
  const auto bits = [&](size_t i) {
    int32_t one;
    std::memcpy(&one, mask + i, sizeof one);
    return one;
  };
  size_t seen = 0;
  while (seen < keys && (bits(seen) & INT32_MAX) == 0) ++seen;
  int32_t least;
  std::memcpy(&least, &hides, sizeof least);
  constexpr int32_t kInfinity = static_cast<int32_t>(0xff800000);
  bool other = false;
  for (size_t i = seen; i < keys; ++i) other |= (bits(i) < least) | (bits(i) > kInfinity);
  return other ? 0 : static_cast<uint32_t>(seen);
}

}  // namespace calmclip
