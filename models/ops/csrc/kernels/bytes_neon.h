// Up to 15 bytes of a NEON register, for the end of a row: only those bytes are read or written.
#pragma once

#include <arm_neon.h>

#include <cstddef>
#include <cstdint>
#include <cstring>

namespace calmclip {

// The first `count` bytes of p, 0 .. 15, then 0.
static inline uint8x16_t first_bytes(const uint8_t* p, size_t count) {
  uint64_t low = 0, high = 0;
  uint64_t* const end = count & 8 ? &high : &low;
  if (count & 8) std::memcpy(&low, p, 8);
  // from the highest byte down, so that a shift makes room for the bytes before
  if (count & 1) *end = p[count - 1];
  if (count & 2) {
    uint16_t two;
    std::memcpy(&two, p + (count & 12), 2);
    *end = *end << 16 | two;
  }
  if (count & 4) {
    uint32_t four;
    std::memcpy(&four, p + (count & 8), 4);
    *end = *end << 32 | four;
  }
  return vcombine_u8(vcreate_u8(low), vcreate_u8(high));
}

// Stores the first `count` bytes, 0 .. 15.
static inline void store_first(uint8_t* p, uint8x16_t bytes, size_t count) {
  uint64_t rest = vgetq_lane_u64(vreinterpretq_u64_u8(bytes), 0);
  if (count & 8) {
    std::memcpy(p, &rest, 8);
    rest = vgetq_lane_u64(vreinterpretq_u64_u8(bytes), 1);
    p += 8;
  }
  if (count & 4) {
    std::memcpy(p, &rest, 4);
    rest >>= 32;
    p += 4;
  }
  if (count & 2) {
    std::memcpy(p, &rest, 2);
    rest >>= 16;
    p += 2;
  }
  if (count & 1) *p = static_cast<uint8_t>(rest);
}

}  // namespace calmclip
