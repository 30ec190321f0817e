#include "quant_attention.h"

#include <immintrin.h>

#include <cfloat>
#include <climits>
#include <cstring>

namespace calmclip {

extern "C" QuantAttention quant_attention_vnni;

#if defined(__clang__)
#define UNROLL _Pragma("unroll")
#else
#define UNROLL _Pragma("GCC unroll 64")
#endif

namespace {

struct V {
  using I = __m512i;
  using F = __m512;
  using K = int8_t;
  static constexpr size_t kWidth = 16, kPack = 4, kTile = 24, kWords = 16;

  static __mmask64 first(size_t n) { return n >= 64 ? ~__mmask64{0} : (__mmask64{1} << n) - 1; }
  static I set(int32_t v) { return _mm512_set1_epi32(v); }
  static F set(float v) { return _mm512_set1_ps(v); }
  static I load(const int32_t* p) { return _mm512_load_si512(p); }
  static I sub(I a, I b) { return _mm512_sub_epi32(a, b); }
  static F mul(F a, F b) { return _mm512_mul_ps(a, b); }
  static F add(F a, F b) { return _mm512_add_ps(a, b); }
  static F sub(F a, F b) { return _mm512_sub_ps(a, b); }
  static F div(F a, F b) { return _mm512_div_ps(a, b); }
  static F fma(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }
  static I max(I a, I b) { return _mm512_max_epi32(a, b); }
  static F max(F a, F b) { return _mm512_max_ps(a, b); }
  static F min(F a, F b) { return _mm512_min_ps(a, b); }
  static F real(I a) { return _mm512_cvtepi32_ps(a); }
  static I bits(F a) { return _mm512_castps_si512(a); }
  static F floats(I a) { return _mm512_castsi512_ps(a); }
  static I seen(I x, I lens, size_t s, I hidden) {
    return _mm512_mask_mov_epi32(hidden, _mm512_cmpgt_epi32_mask(lens, set(static_cast<int32_t>(s))), x);
  }

  // Written out: with the intrinsic and more than about twenty accumulators, gcc 12 spills some of them, and it does
  // not use the broadcast operand of the instruction.
  static void dot(I& sum, I x, const K* k) {
    typedef int32_t __attribute__((may_alias)) Word;
    asm("vpdpbusd %2%{1to16%}, %1, %0" : "+v"(sum) : "v"(x), "m"(*reinterpret_cast<const Word*>(k)));
  }

  static void spread(I& sum, I x, const K* k) { sum = _mm512_dpbusd_epi32(sum, x, _mm512_loadu_si512(k)); }

  static F fraction(F x) { return _mm512_reduce_ps(x, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC); }
  static F raise(F m, F x) { return _mm512_scalef_ps(m, x); }
  static I count(I sum, I p) { return _mm512_dpbusd_epi32(sum, p, _mm512_set1_epi8(1)); }
  // The lowest bytes of four words; that of the first word is the lowest.
  static I pack(const I (&p)[4]) {
    constexpr int kSelect = 0xca;  // a ? b : c
    const I low = _mm512_ternarylogic_epi32(set(0xff), p[0], _mm512_slli_epi32(p[1], 8), kSelect);
    const I high =
        _mm512_ternarylogic_epi32(set(0xff0000), _mm512_slli_epi32(p[2], 16), _mm512_slli_epi32(p[3], 24), kSelect);
    return _mm512_ternarylogic_epi32(set(0xffff), low, high, kSelect);
  }
  static I bytes(const I (&p)[4]) { return pack(p); }
  static I move(I x, const uint8_t* zeros) {
    int32_t four;
    std::memcpy(&four, zeros, sizeof four);
    return _mm512_add_epi8(x, set(four));
  }

  // The first n of 64 bytes, the others 0. For all 64 it uses no mask, because masked stores are slow.
  static I read(const uint8_t* p, size_t n) {
    return n >= 64 ? _mm512_loadu_si512(p) : _mm512_maskz_loadu_epi8(first(n), p);
  }
  static void write(uint8_t* p, I x, size_t n) {
    n >= 64 ? _mm512_storeu_si512(p, x) : _mm512_mask_storeu_epi8(p, first(n), x);
  }

  static void keep(const uint8_t* k, size_t step, size_t rows, size_t n, K* out, int32_t* sums, bool more) {
    const __mmask64 there = first(n);
    const I middle = _mm512_maskz_set1_epi8(there, -128), none = _mm512_setzero_si512();
    for (size_t s = 0; s < rows; s += 4) {
      // each of a row's eight sums fits 11 bits, and their total 14 bits: one word holds the sums of four rows
      I four = none;
      for (size_t i = 0; i < 4 && s + i < rows; ++i) {
        const I x = read(k + (s + i) * step, n);
        _mm512_store_si512(out + (s + i) * 64, _mm512_xor_si512(x, middle));
        four = _mm512_or_si512(four, _mm512_slli_epi64(_mm512_sad_epu8(x, none), static_cast<unsigned>(16 * i)));
      }
      const auto all = static_cast<uint64_t>(_mm512_reduce_add_epi64(four));
      for (size_t i = 0; i < 4 && s + i < rows; ++i) {
        const int32_t sum = static_cast<int32_t>(all >> (16 * i) & 0xffff) - 128 * static_cast<int32_t>(n);
        sums[s + i] = more ? sums[s + i] + sum : sum;
      }
    }
  }

  // Four rows, 64 numbers of each at a time; the next group overwrites the bytes written past the last number.
  static void weave(const uint8_t* v, size_t step, size_t rows, size_t n, K* out) {
    for (size_t i = 0; i < n; i += 64) {
      const I middle = _mm512_maskz_set1_epi8(first(n - i), -128);
      I x[4];
      for (size_t r = 0; r < 4; ++r)
        x[r] = r < rows ? _mm512_xor_si512(read(v + r * step + i, n - i), middle) : _mm512_setzero_si512();
      const I a = _mm512_unpacklo_epi8(x[0], x[1]), b = _mm512_unpacklo_epi8(x[2], x[3]);
      const I c = _mm512_unpackhi_epi8(x[0], x[1]), d = _mm512_unpackhi_epi8(x[2], x[3]);
      const I y[4] = {_mm512_unpacklo_epi16(a, b), _mm512_unpackhi_epi16(a, b), _mm512_unpacklo_epi16(c, d),
                      _mm512_unpackhi_epi16(c, d)};  // a quarter of 16 numbers each
      const I e = _mm512_shuffle_i32x4(y[0], y[1], 0x44), f = _mm512_shuffle_i32x4(y[2], y[3], 0x44);
      const I g = _mm512_shuffle_i32x4(y[0], y[1], 0xee), h = _mm512_shuffle_i32x4(y[2], y[3], 0xee);
      const I z[4] = {_mm512_shuffle_i32x4(e, f, 0x88), _mm512_shuffle_i32x4(e, f, 0xdd),
                      _mm512_shuffle_i32x4(g, h, 0x88), _mm512_shuffle_i32x4(g, h, 0xdd)};
      for (size_t j = 0; j < 4 && i + j * 16 < n; ++j) _mm512_storeu_si512(out + (i + j * 16) * 4, z[j]);
    }
  }

  // 16 x 16 words.
  static void transpose(I (&r)[16]) {
    I t[16];
    UNROLL for (size_t i = 0; i < 16; i += 2) {
      t[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
      t[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
    }
    UNROLL for (size_t i = 0; i < 16; i += 4) {
      r[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
      r[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
      r[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
      r[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
    }
    UNROLL for (size_t i = 0; i < 4; ++i) {
      t[i] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0x88);
      t[i + 4] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0xdd);
      t[i + 8] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0x88);
      t[i + 12] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0xdd);
    }
    UNROLL for (size_t i = 0; i < 8; ++i) {
      r[i] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0x88);
      r[i + 8] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0xdd);
    }
  }

  // Transposes bytes [start, start + 64) of up to 16 rows by words, up to `n`; -> the number of words.
  static size_t words(const uint8_t* x, size_t step, size_t rows, size_t n, size_t start, I (&r)[16]) {
    const size_t left = n - start;
    for (size_t i = 0; i < 16; ++i)
      r[i] = i < rows ? read(x + i * step + start, left) : _mm512_setzero_si512();
    transpose(r);
    return left < 64 ? (left + 3) / 4 : 16;
  }

  static void panel(const uint8_t* q, size_t step, size_t rows, size_t dims, I* out) {
    I r[16];
    for (size_t i = 0; i < dims; i += 64) {
      const size_t count = words(q, step, rows, dims, i, r);
      for (size_t w = 0; w < count; ++w) out[i / 4 + w] = r[w];
    }
  }

  static void transpose(const float* x, size_t step, size_t rows, size_t n, F* out) {
    I r[16];
    for (size_t i = 0; i < n; i += 16) {
      const size_t count = words(reinterpret_cast<const uint8_t*>(x), step * 4, rows, n * 4, i * 4, r);
      for (size_t w = 0; w < count; ++w) out[i + w] = floats(r[w]);
    }
  }

  static void put(const I* x, size_t rows, size_t dims, uint8_t* y, size_t step) {
    for (size_t i = 0; i < dims; i += 64) {
      const size_t count = dims - i < 64 ? (dims - i + 3) / 4 : 16;
      I r[16];
      for (size_t w = 0; w < 16; ++w) r[w] = w < count ? x[i / 4 + w] : _mm512_setzero_si512();
      transpose(r);
      for (size_t row = 0; row < rows; ++row) write(y + row * step + i, r[row], dims - i);
    }
  }
};

#include "quant_attention_body.inc"
#include "quant_attention_few.inc"

}  // namespace

void quant_attention_vnni(const AttentionHead& head, void* scratch) { attend(head, scratch); }

}  // namespace calmclip
