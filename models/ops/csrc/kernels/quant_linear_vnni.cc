#include "quant_linear.h"

#include <immintrin.h>

#include <cstring>

#include "activation_curve.h"
#include "quant_conv.h"

namespace calmclip {

extern "C" QuantLinear quant_linear_vnni;
extern "C" QuantConv quant_conv_vnni;
extern "C" QuantConvTiles quant_conv_tiles_vnni;
extern "C" Int8Peak int8_peak_vnni;

namespace {

// sum += the dot products of four unsigned bytes of x with four signed bytes of w. Not the intrinsic: with it gcc 12
// keeps a tile's sums in memory, which halves the speed.
inline void dot(__m512i& sum, __m512i x, __m512i w) { asm("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(x), "v"(w)); }

inline __m512i four(const uint8_t* x) {
  int32_t bytes;
  std::memcpy(&bytes, x, sizeof bytes);
  return _mm512_set1_epi32(bytes);
}

// Stores numbers of two times sixteen columns as bytes: zero added, clipped to 0 .. 255.
struct Zero {
  __m512i words;  // in the order that packing leaves
  explicit Zero(const int32_t* zero)
      : words(_mm512_packs_epi32(_mm512_loadu_si512(zero), _mm512_loadu_si512(zero + 16))) {}

  __m256i bytes(__m512i a, __m512i b) const {
    const __m512i sums = _mm512_adds_epi16(_mm512_packs_epi32(a, b), words);
    // each 128 bits hold four bytes of the first vector, four of the second, and both again
    const __m512i bytes = _mm512_packus_epi16(sums, sums);
    const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 0, 0, 0, 0, 0, 0, 0, 0);
    return _mm512_castsi512_si256(_mm512_permutexvar_epi32(order, bytes));
  }
};

struct Floored : Zero {
  __m256i floor;
  Floored(const int32_t* zero, const uint8_t* floor)
      : Zero(zero), floor(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(floor))) {}

  __m256i bytes(__m512i a, __m512i b) const { return _mm256_max_epu8(Zero::bytes(a, b), floor); }
};

// The destination of a tile's bytes and the constants of its columns; rows of y are n apart.
struct Target {
  const float *scale, *bias;
  const int32_t* zero;
  const uint8_t* floor;
  uint8_t* y;
  size_t n, columns;
};

template <size_t rows, size_t halves>
inline void write(const Target& target, const __m512i (&sum)[rows][halves]) {
  const Floored zero(target.zero, target.floor);
  const auto there = static_cast<__mmask32>((uint64_t{1} << target.columns) - 1);
  __m512 scale[halves], bias[halves];
  for (size_t h = 0; h < halves; ++h) {
    scale[h] = _mm512_loadu_ps(target.scale + 16 * h);
    bias[h] = _mm512_loadu_ps(target.bias + 16 * h);
  }
  uint8_t* y = target.y;
#pragma GCC unroll 16
  for (size_t r = 0; r < rows; ++r, y += target.n) {
    __m512i q[halves];
    for (size_t h = 0; h < halves; ++h)
      q[h] = _mm512_cvtps_epi32(_mm512_fmadd_ps(_mm512_cvtepi32_ps(sum[r][h]), scale[h], bias[h]));
    _mm256_mask_storeu_epi8(y, there, zero.bytes(q[0], q[halves - 1]));
  }
}

inline void dot_words(__m512i& sum, __m512i x, __m512i w) { asm("vpdpwssd %2, %1, %0" : "+v"(sum) : "v"(x), "v"(w)); }

// The sums of a tile, followed by the epilogue `end`; `halves` of its panel. `multiply`: dot or dot_words.
template <size_t rows, size_t halves, auto multiply = dot, class End>
inline void product_of(const Product& p, End end) {
  __m512i sum[rows][halves];
#pragma GCC unroll 16
  for (size_t r = 0; r < rows; ++r)
    for (size_t h = 0; h < halves; ++h) sum[r][h] = _mm512_loadu_si512(p.from + r * p.from_stride + 16 * h);
  // One pointer for every third row, hidden from the compiler: it would derive one pointer for each row, and there are
  // no registers for these.
  constexpr size_t groups = (rows + 2) / 3;
  const size_t stride = p.stride;
  const int8_t *w = p.panel, *ahead = p.ahead;
  const uint8_t* line = p.x;
  for (size_t i = 1;; ++i) {
    const uint8_t* x[groups];
#pragma GCC unroll 16
    for (size_t g = 0; g < groups; ++g) x[g] = line + 3 * g * stride;
    for (const int8_t* last = w + p.steps * 4 * kPanel; w != last; w += 4 * kPanel) {
      __m512i columns[halves];
#pragma GCC unroll 2
      for (size_t h = 0; h < halves; ++h) columns[h] = _mm512_loadu_si512(w + 64 * h);
      _mm_prefetch(ahead, _MM_HINT_T1);
      ahead += p.ahead_step;
#pragma GCC unroll 16
      for (size_t r = 0; r < rows; ++r) {
        const __m512i bytes = four(x[r / 3] + r % 3 * stride);
#pragma GCC unroll 2
        for (size_t h = 0; h < halves; ++h) multiply(sum[r][h], bytes, columns[h]);
      }
#pragma GCC unroll 16
      for (size_t g = 0; g < groups; ++g) {
        x[g] += 4;
        asm("" : "+r"(x[g]));
      }
    }
    if (i == p.lines) break;
    line = p.line[i];
  }
  end(sum);
}

template <size_t rows, auto multiply = dot>
void store_sums(const Product& p) {
  product_of<rows, 2, multiply>(p, [&](const __m512i(&sum)[rows][2]) {
#pragma GCC unroll 16
    for (size_t r = 0; r < rows; ++r)
      for (size_t h = 0; h < 2; ++h) _mm512_storeu_si512(p.sums + r * kPanel + 16 * h, sum[r][h]);
  });
}

template <size_t rows, size_t halves>
void write_bytes(const Product& p, const Target& target) {
  product_of<rows, halves>(p, [&](const __m512i(&sum)[rows][halves]) { write(target, sum); });
}

struct V {
  using F = __m512;
  using I = __m512i;
  static constexpr size_t kWidth = 16, kRows = 12;

  static void product(size_t rows, const Product& p) {
    static void (*const all[kRows])(const Product&) = {
        store_sums<1>, store_sums<2>, store_sums<3>, store_sums<4>,  store_sums<5>,  store_sums<6>,
        store_sums<7>, store_sums<8>, store_sums<9>, store_sums<10>, store_sums<11>, store_sums<12>};
    all[rows - 1](p);
  }
  using Zero = calmclip::Zero;
  using Floored = calmclip::Floored;
  static F set(float v) { return _mm512_set1_ps(v); }
  static F load(const float* p) { return _mm512_loadu_ps(p); }
  static I load(const int32_t* p) { return _mm512_loadu_si512(p); }
  static void store(float* p, F v) { _mm512_storeu_ps(p, v); }
  template <class Zeros>
  static void store(uint8_t* p, const I* v, Zeros zero) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), zero.bytes(v[0], v[1]));
  }
  static F add(F a, F b) { return _mm512_add_ps(a, b); }
  static F sub(F a, F b) { return _mm512_sub_ps(a, b); }
  static F mul(F a, F b) { return _mm512_mul_ps(a, b); }
  static F fma(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }
  static F fused(F a, F b, F c) { return fma(a, b, c); }
  static F max(F a, F b) { return _mm512_max_ps(a, b); }
  static F min(F a, F b) { return _mm512_min_ps(a, b); }
  static F absolute(F v) { return _mm512_abs_ps(v); }
  static F to_float(I v) { return _mm512_cvtepi32_ps(v); }
  static I to_int(F v) { return _mm512_cvtps_epi32(v); }

  struct Table {
    F low[4], high[4];
    explicit Table(const ActivationCurve& curve) {
      for (size_t k = 0; k < 4; ++k) {
        low[k] = load(curve.c[k]);
        high[k] = load(curve.c[k] + 16);
      }
    }
    void find(F v, F (&c)[4]) const {
      const I i = _mm512_srli_epi32(_mm512_castps_si512(v), kIntervalShift);  // only the lowest five bits are read
      for (size_t k = 0; k < 4; ++k) c[k] = _mm512_permutex2var_ps(low[k], i, high[k]);
    }
  };
};

#include "quant_linear_body.inc"
#include "quant_conv_body.inc"

struct W {
  using S = __m512i;
  static constexpr size_t kShorts = 32, kRows = 7, kBlock = 7;
  static S bytes(const uint8_t* p, S zero) {
    return _mm512_sub_epi16(_mm512_cvtepu8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))), zero);
  }
  static S set(int16_t x) { return _mm512_set1_epi16(x); }
  static S add16(S a, S b) { return _mm512_add_epi16(a, b); }
  static S sub16(S a, S b) { return _mm512_sub_epi16(a, b); }
  template <int factor>
  static S times16(S x) {
    return _mm512_slli_epi16(x, factor / 2);  // 2 and 4
  }
  static void store16(int16_t* p, S x) { _mm512_storeu_si512(p, x); }

  static void product(size_t rows, const Product& p) {
    using Tile = void(const Product&);
    static constexpr Tile* all[kRows] = {
        store_sums<1, dot_words>, store_sums<2, dot_words>, store_sums<3, dot_words>, store_sums<4, dot_words>,
        store_sums<5, dot_words>, store_sums<6, dot_words>, store_sums<7, dot_words>};
    all[rows - 1](p);
  }
  static V::I add32(V::I a, V::I b) { return _mm512_add_epi32(a, b); }
  static V::I sub32(V::I a, V::I b) { return _mm512_sub_epi32(a, b); }
  template <int factor>
  static V::I times32(V::I x) {
    return _mm512_slli_epi32(x, factor == 8 ? 3 : factor / 2);
  }
  static V::I quotient(V::I x) {
    return _mm512_srai_epi32(_mm512_mullo_epi32(x, _mm512_set1_epi32(static_cast<int>(kNinth))), 6);
  }
  static void store32(int32_t* p, V::I x) { _mm512_storeu_si512(p, x); }
};

#include "quant_conv_tiles_body.inc"

constexpr size_t kFewWeights = 64 << 10;
constexpr size_t kStripRows = 96;  // with few weights; their bytes of y stay in the caches until all panels are done

// Blocks of equally many rows of one panel, one below the other. A call for each tile took half as long as an epilogue.
struct Strip {
  const uint8_t* x;
  size_t k, steps, blocks;
  const int8_t* panel;
  const int32_t* start;
  const int8_t* ahead;  // of the first block; those of the next begin `share` further on
  size_t share, ahead_step;
  Target target;
};

// What the zero points and the floor of a panel need.
enum Shift : size_t { kNoShift, kZero, kZeroAndFloor };

// Writes two rows at a time.
template <size_t rows, size_t halves, Shift shift>
void write_strip(const Strip& strip) {
  constexpr size_t groups = (rows + 2) / 3;
  const Target& target = strip.target;
  const size_t stride = strip.k, n = target.n;
  const auto there = static_cast<__mmask32>((uint64_t{1} << target.columns) - 1);
  const __m512i zero = Zero(target.zero).words;
  const __m512i floor =
      _mm512_broadcast_i64x4(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(target.floor)));
  // each 128 bits hold four bytes of the two halves of a row, and of the next row's
  const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
  const uint8_t* from = strip.x;
  uint8_t* y = target.y;
  const int8_t* next = strip.ahead;
  for (size_t block = 0; block < strip.blocks; ++block, from += rows * stride, y += rows * n, next += strip.share) {
    for (size_t r = 0; r < rows; ++r) __builtin_prefetch(y + r * n, 1);
    __m512i sum[rows][halves];
#pragma GCC unroll 16
    for (size_t r = 0; r < rows; ++r)
      for (size_t h = 0; h < halves; ++h) sum[r][h] = _mm512_loadu_si512(strip.start + 16 * h);
    const uint8_t* x[groups];
#pragma GCC unroll 16
    for (size_t g = 0; g < groups; ++g) x[g] = from + 3 * g * stride;
    const int8_t *w = strip.panel, *ahead = next;
    for (const int8_t* last = w + strip.steps * 4 * kPanel; w != last; w += 4 * kPanel) {
      __m512i columns[halves];
#pragma GCC unroll 2
      for (size_t h = 0; h < halves; ++h) columns[h] = _mm512_loadu_si512(w + 64 * h);
      _mm_prefetch(ahead, _MM_HINT_T1);
      _mm_prefetch(ahead + 64, _MM_HINT_T1);
      ahead += strip.ahead_step;
#pragma GCC unroll 16
      for (size_t r = 0; r < rows; ++r) {
        const __m512i bytes = four(x[r / 3] + r % 3 * stride);
#pragma GCC unroll 2
        for (size_t h = 0; h < halves; ++h) dot(sum[r][h], bytes, columns[h]);
      }
#pragma GCC unroll 16
      for (size_t g = 0; g < groups; ++g) {
        x[g] += 4;
        asm("" : "+r"(x[g]));
      }
    }
    __m512 scale[halves], bias[halves];
    for (size_t h = 0; h < halves; ++h) {
      scale[h] = _mm512_loadu_ps(target.scale + 16 * h);
      bias[h] = _mm512_loadu_ps(target.bias + 16 * h);
    }
    uint8_t* to = y;
#pragma GCC unroll 16
    for (size_t r = 0; r < rows; r += 2, to += 2 * n) {
      __m512i words[2];
#pragma GCC unroll 2
      for (size_t i = 0; i < 2; ++i) {
        __m512i q[halves];
        for (size_t h = 0; h < halves; ++h)
          q[h] = _mm512_cvtps_epi32(
              _mm512_fmadd_ps(_mm512_cvtepi32_ps(sum[r + i < rows ? r + i : r][h]), scale[h], bias[h]));
        words[i] = _mm512_packs_epi32(q[0], q[halves - 1]);
        if constexpr (shift != kNoShift) words[i] = _mm512_adds_epi16(words[i], zero);
      }
      __m512i bytes = _mm512_permutexvar_epi32(order, _mm512_packus_epi16(words[0], words[1]));
      if constexpr (shift == kZeroAndFloor) bytes = _mm512_max_epu8(bytes, floor);
      _mm256_mask_storeu_epi8(to, there, _mm512_castsi512_si256(bytes));
      if (r + 1 < rows) _mm256_mask_storeu_epi8(to + n, there, _mm512_extracti64x4_epi64(bytes, 1));
    }
  }
}

using WriteStrip = void(const Strip&);

struct Blocks {
  size_t begin, end, rows;
};

constexpr size_t kFewestRows = 9;  // of a block, if there are at least 3 * V::kRows
template <size_t halves, Shift shift>
inline constexpr WriteStrip* kStrips[] = {write_strip<9, halves, shift>, write_strip<10, halves, shift>,
                                          write_strip<11, halves, shift>, write_strip<12, halves, shift>};

void write_strip(size_t rows, const Strip& strip) {
  static WriteStrip* const* const all[2][3] = {{kStrips<1, kNoShift>, kStrips<1, kZero>, kStrips<1, kZeroAndFloor>},
                                               {kStrips<2, kNoShift>, kStrips<2, kZero>, kStrips<2, kZeroAndFloor>}};
  const Target& target = strip.target;
  Shift shift = kNoShift;
  for (size_t i = 0; i < target.columns; ++i) {
    if (target.zero[i] && shift == kNoShift) shift = kZero;
    if (target.floor[i]) shift = kZeroAndFloor;
  }
  all[target.columns > 16][shift][rows - kFewestRows](strip);
}

// For results with a floor: tiles become bytes in the registers of their sums.
void bytes_at_once(const LinearWork& work, size_t first, size_t last) {
  using Tile = void(const Product&, const Target&);
  static Tile* const all[2][V::kRows] = {
      {write_bytes<1, 1>, write_bytes<2, 1>, write_bytes<3, 1>, write_bytes<4, 1>, write_bytes<5, 1>,
       write_bytes<6, 1>, write_bytes<7, 1>, write_bytes<8, 1>, write_bytes<9, 1>, write_bytes<10, 1>,
       write_bytes<11, 1>, write_bytes<12, 1>},
      {write_bytes<1, 2>, write_bytes<2, 2>, write_bytes<3, 2>, write_bytes<4, 2>, write_bytes<5, 2>,
       write_bytes<6, 2>, write_bytes<7, 2>, write_bytes<8, 2>, write_bytes<9, 2>, write_bytes<10, 2>,
       write_bytes<11, 2>, write_bytes<12, 2>}};
  const size_t bytes = linear_panel_bytes(work.k), quads = work.k / 4, remainder = work.k % 4;
  const size_t blocks = (work.rows + V::kRows - 1) / V::kRows;
  if (blocks == 0) return;
  const size_t share = (bytes + blocks - 1) / blocks, ahead_step = (4 * kPanel + blocks - 1) / blocks;
  // The first `more` blocks have one row more than the others.
  const size_t fewer = work.rows / blocks, more = work.rows % blocks;
  const auto row_of = [&](size_t block) { return block * fewer + (block < more ? block : more); };
  const auto target_of = [&](size_t panel, size_t row) -> Target {
    const size_t column = panel * kPanel, columns = work.n - column < kPanel ? work.n - column : kPanel;
    return {work.scale + column, work.bias + column, work.zero + column, work.floor + column,
            work.bytes + row * work.n + column, work.n, columns};
  };
  const auto strip = [&](size_t panel, size_t from, size_t to) {
    const int8_t *w = work.panels + panel * bytes, *next = w + bytes;
    const size_t middle = more < from ? from : more < to ? more : to;
    const Blocks parts[] = {{from, middle, fewer + 1}, {middle, to, fewer}};
    for (const auto& [begin, end, rows] : parts)
      if (begin < end)
        write_strip(rows, {work.x + row_of(begin) * work.k, work.k, linear_panel_bytes(work.k) / (4 * kPanel),
                           end - begin, w, work.start + panel * kPanel, next + begin * share, share, ahead_step,
                           target_of(panel, row_of(begin))});
  };
  alignas(64) int32_t sums[V::kRows * kPanel];
  uint8_t last_bytes[V::kRows * 4] = {};
  const auto tile = [&](size_t panel, size_t block) {
    const int8_t *w = work.panels + panel * bytes, *next = w + bytes;
    const size_t row = row_of(block), rows = row_of(block + 1) - row;
    const uint8_t* x = work.x + row * work.k;
    const Target target = target_of(panel, row);
    Tile* const write = all[target.columns > 16][rows - 1];
    const Product product{x, work.k, w, quads, work.start + panel * kPanel, 0, next + block * share, ahead_step, sums};
    ask(work, panel * kPanel, row, rows);
    if (remainder == 0) return write(product, target);
    V::product(rows, product);
    for (size_t r = 0; r < rows; ++r)
      for (size_t i = 0; i < remainder; ++i) last_bytes[4 * r + i] = x[r * work.k + 4 * quads + i];
    write({last_bytes, 4, w + quads * 4 * kPanel, 1, sums, kPanel, next, 0, sums}, target);
  };
  // With a remainder, a row's last step reads bytes of the next row too, times weights of 0. So the last block, behind
  // which there may be no bytes, is no strip.
  const size_t strips = fewer < kFewestRows ? 0 : remainder ? blocks - 1 : blocks;
  // Few weights stay in the caches, so rows are written as a whole. With many weights each panel is read once.
  const bool few = (last - first) * bytes <= kFewWeights;
  const size_t most = few ? kStripRows / V::kRows : blocks;
  for (size_t from = 0; from < strips; from += most)
    for (size_t panel = first; panel < last; ++panel) strip(panel, from, from + most < strips ? from + most : strips);
  if (few) {
    for (size_t block = strips; block < blocks; ++block)
      for (size_t panel = first; panel < last; ++panel) tile(panel, block);
  } else {
    for (size_t panel = first; panel < last; ++panel)
      for (size_t block = strips; block < blocks; ++block) tile(panel, block);
  }
}

// A tile of a convolution as bytes at once; `all` by columns and places.
template <size_t... rows>
struct ConvTiles {
  using Tile = void(const Product&, const Target&);
  static constexpr Tile* all[2][sizeof...(rows)] = {{write_bytes<rows + 1, 1>...}, {write_bytes<rows + 1, 2>...}};
};

void conv_tile(const ConvWork& work, const ConvTile& tile) {
  const LinearWork& of = work.of;
  if (!of.floor) return sum_tile(work, tile);
  using Tiles = ConvTiles<0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13>;
  const size_t column = tile.panel * kPanel, columns = of.n - column < kPanel ? of.n - column : kPanel;
  const size_t bytes = work.panel_bytes();
  const int8_t* w = of.panels + tile.panel * bytes;
  uint8_t* y = of.bytes + tile.place * of.n + column;
  for (size_t r = 0; r < tile.places; ++r) __builtin_prefetch(y + r * of.n, 1);
  const Target target{of.scale + column, of.bias + column, of.zero + column, of.floor + column,
                      y,                 of.n,             columns};
  Tiles::all[columns > 16][tile.places - 1](
      {tile.line[0], tile.stride, w, work.steps(), of.start + column, 0, w + bytes + tile.ahead, tile.ahead_step,
       nullptr, tile.line, work.high},
      target);
}

}  // namespace

void quant_conv_vnni(const ConvWork& work, const ConvPart& part) { conv<14>(work, part, conv_tile); }

void quant_conv_tiles_vnni(const ConvWork& work, const ConvTilesPart& part) { conv_tiles(work, part); }

void quant_linear_vnni(const LinearWork& work, size_t first, size_t last) {
  work.floor ? bytes_at_once(work, first, last) : linear(work, first, last);
}

int32_t int8_peak_vnni(size_t rounds) {
  __m512i sum[24], x = _mm512_set1_epi32(0x01020304), w = _mm512_set1_epi32(0x7f80fe01);
#pragma GCC unroll 24
  for (auto& s : sum) s = _mm512_setzero_si512();
  for (size_t i = 0; i < rounds; ++i) {
#pragma GCC unroll 24
    for (auto& s : sum) dot(s, x, w);  // 24 x 64 products
  }
#pragma GCC unroll 24
  for (size_t k = 1; k < 24; ++k) sum[0] = _mm512_xor_si512(sum[0], sum[k]);
  return _mm_cvtsi128_si32(_mm512_castsi512_si128(sum[0]));
}

}  // namespace calmclip
