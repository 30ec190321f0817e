#include "rotary_attention.h"

#include <cstring>

namespace calmclip {

extern "C" RotaryAttention rotary_attention_scalar;

#if defined(__clang__)
#define UNROLL _Pragma("unroll")
#else
#define UNROLL _Pragma("GCC unroll 16")
#endif

namespace {

struct V {
  using F = float;
  static constexpr size_t kWidth = 1, kTile = 4;
  static F set(float v) { return v; }
  static F load(const float* p) { return *p; }
  static void store(float* p, F v) { *p = v; }
  static F fma(F a, F b, F c) { return __builtin_fmaf(a, b, c); }
  static F max(F a, F b) { return a > b ? a : b; }
  static F min(F a, F b) { return a < b ? a : b; }
  static F within(F x, F s, F a, F b) { return a <= s && s < b ? x : kLowest; }
  static F raise(F p, F n) {
    uint32_t power, bits;
    std::memcpy(&power, &p, sizeof power);
    std::memcpy(&bits, &n, sizeof bits);
    power += bits << 23;
    std::memcpy(&p, &power, sizeof p);
    return p;
  }
};

#include "rotary_attention_body.inc"

}  // namespace

void rotary_attention_scalar(const AttentionGroup& group, float* scratch) { Group(group, scratch).rows(); }

}  // namespace calmclip
