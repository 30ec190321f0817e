#include "quant_attention.h"

#include <immintrin.h>

#include <cfloat>
#include <climits>
#include <cstring>

namespace calmclip {

extern "C" QuantAttention quant_attention_avx2;

#if defined(__clang__)
#define UNROLL _Pragma("unroll")
#else
#define UNROLL _Pragma("GCC unroll 64")
#endif

namespace {

// In 16 bits: the instruction for pairs of byte products (vpmaddubsw) saturates, the one for pairs of 16 bits does not.
struct V {
  using I = __m256i;
  using F = __m256;
  using K = int16_t;
  static constexpr size_t kWidth = 8, kPack = 2, kTile = 12, kWords = 16;

  static I set(int32_t v) { return _mm256_set1_epi32(v); }
  static F set(float v) { return _mm256_set1_ps(v); }
  static I load(const int32_t* p) { return _mm256_load_si256(reinterpret_cast<const I*>(p)); }
  static I sub(I a, I b) { return _mm256_sub_epi32(a, b); }
  static F mul(F a, F b) { return _mm256_mul_ps(a, b); }
  static F add(F a, F b) { return _mm256_add_ps(a, b); }
  static F sub(F a, F b) { return _mm256_sub_ps(a, b); }
  static F div(F a, F b) { return _mm256_div_ps(a, b); }
  static F fma(F a, F b, F c) { return _mm256_fmadd_ps(a, b, c); }
  static I max(I a, I b) { return _mm256_max_epi32(a, b); }
  static F max(F a, F b) { return _mm256_max_ps(a, b); }
  static F min(F a, F b) { return _mm256_min_ps(a, b); }
  static F real(I a) { return _mm256_cvtepi32_ps(a); }
  static I bits(F a) { return _mm256_castps_si256(a); }
  static F floats(I a) { return _mm256_castsi256_ps(a); }
  static I seen(I x, I lens, size_t s, I hidden) {
    return _mm256_blendv_epi8(hidden, x, _mm256_cmpgt_epi32(lens, set(static_cast<int32_t>(s))));
  }

  // Written out: gcc 12 multiplies for all sums before it adds, and then spills half of the products.
  static void dot(I& sum, I x, const K* k) {
    typedef int32_t __attribute__((may_alias)) Word;
    I product;
    asm("vpbroadcastd %2, %1\n\tvpmaddwd %1, %3, %1\n\tvpaddd %1, %0, %0"
        : "+x"(sum), "=&x"(product)
        : "m"(*reinterpret_cast<const Word*>(k)), "x"(x));
  }

  // For large negative x the bits of the exponent are 0, and so is the power.
  static F bounded(F x) { return max(x, set(-127.0f)); }
  static F fraction(F x) { return sub(bounded(x), _mm256_floor_ps(bounded(x))); }
  static F raise(F m, F x) {
    const I exponent = _mm256_cvttps_epi32(add(_mm256_floor_ps(bounded(x)), set(127.0f)));
    return mul(m, floats(_mm256_slli_epi32(exponent, 23)));
  }
  static I count(I sum, I p) { return _mm256_add_epi32(sum, _mm256_madd_epi16(p, _mm256_set1_epi16(1))); }
  static I pack(const I (&p)[2]) { return _mm256_blend_epi16(p[0], _mm256_slli_epi32(p[1], 16), 0xaa); }
  static I bytes(const I (&p)[4]) {
    const I mask = set(0xff);
    const auto byte = [&](size_t i, int by) { return _mm256_slli_epi32(_mm256_and_si256(p[i], mask), by); };
    return _mm256_or_si256(_mm256_or_si256(byte(0, 0), byte(1, 8)), _mm256_or_si256(byte(2, 16), byte(3, 24)));
  }
  static I move(I x, const uint8_t* zeros) {
    int32_t four;
    std::memcpy(&four, zeros, sizeof four);
    return _mm256_add_epi8(x, set(four));
  }

  static void keep(const uint8_t* k, size_t step, size_t rows, size_t n, K* out, int32_t* sums, bool more) {
    for (size_t s = 0; s < rows; ++s, k += step, out += 32) {
      int32_t sum = more ? sums[s] : 0;
      for (size_t i = 0; i < n; ++i) {
        out[i] = static_cast<K>(k[i] - 128);
        sum += out[i];
      }
      for (size_t i = n; i < 32; ++i) out[i] = 0;
      sums[s] = sum;
    }
  }

  static void weave(const uint8_t* v, size_t step, size_t rows, size_t n, K* out) {
    for (size_t i = 0; i < n; ++i) {
      out[2 * i] = static_cast<K>(v[i] - 128);
      out[2 * i + 1] = rows == 2 ? static_cast<K>(v[step + i] - 128) : K{0};
    }
    for (size_t i = n; i % 4; ++i) out[2 * i] = out[2 * i + 1] = 0;
  }

  static void panel(const uint8_t* q, size_t step, size_t rows, size_t dims, I* out) {
    auto* const y = reinterpret_cast<uint16_t*>(out);
    for (size_t r = 0; r < kWidth; ++r)
      for (size_t i = 0; i < (dims + 1) / 2 * 2; ++i)
        y[i / 2 * 16 + r * 2 + i % 2] = r < rows && i < dims ? q[r * step + i] : 0;
  }

  static void transpose(const float* x, size_t step, size_t rows, size_t n, F* out) {
    auto* const y = reinterpret_cast<float*>(out);
    for (size_t r = 0; r < kWidth; ++r)
      for (size_t i = 0; i < n; ++i) y[i * kWidth + r] = r < rows ? x[r * step + i] : 0;
  }

  static void put(const I* x, size_t rows, size_t dims, uint8_t* y, size_t step) {
    const auto* const bytes = reinterpret_cast<const uint8_t*>(x);
    for (size_t r = 0; r < rows; ++r) {
      size_t i = 0;
      for (; i + 4 <= dims; i += 4) std::memcpy(y + r * step + i, bytes + i * kWidth + r * 4, 4);
      for (; i < dims; ++i) y[r * step + i] = bytes[i / 4 * 4 * kWidth + r * 4 + i % 4];
    }
  }
};

#include "quant_attention_body.inc"

}  // namespace

void quant_attention_avx2(const AttentionHead& head, void* scratch) { Head(head, scratch).rows(); }

}  // namespace calmclip
