#include "image_to_pixels.h"

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <cstring>

#include "dispatch.h"

namespace calmclip {
namespace {

constexpr size_t kStrip = 512;  // output columns at a time, so that the intermediate data stays in the caches

struct Free {
  void operator()(void* memory) const { std::free(memory); }
};
using Block = std::unique_ptr<uint8_t, Free>;

Block block(size_t bytes) { return Block(static_cast<uint8_t*>(std::aligned_alloc(64, (bytes + 63) / 64 * 64))); }

template <class T>
std::unique_ptr<T[]> array(size_t count) {
  return std::unique_ptr<T[]>(new (std::nothrow) T[count]);
}

// Keys 1981 with a = -1/2, and the triangle filter; x >= 0.
double cubic(double x) {
  constexpr double a = -0.5;
  const double near = ((a + 2.0) * x - (a + 3.0)) * x * x + 1.0;
  const double far = (((x - 5.0) * x + 8.0) * x - 4.0) * a;
  return x < 1.0 ? near : x < 2.0 ? far : 0.0;
}
double triangle(double x) { return x < 1.0 ? 1.0 - x : 0.0; }

}  // namespace

// The weights of outputs [first, first + count) of an axis that is resized from `source` to `resized` samples. Output o
// is centred at (o + 0.5) * source / resized. For a smaller output the filter is stretched by that ratio. Weights sum
// to 1 in double. They are then rounded to 22 bits, half away from zero.
bool ImageToPixels::Axis::fill(size_t source, size_t resized, size_t first, size_t count, Filter filter) {
  const double scale = static_cast<double>(source) / static_cast<double>(resized);
  const double stretch = std::max(scale, 1.0), inverse = 1.0 / stretch;
  const double support = (filter == Filter::bicubic ? 2.0 : 1.0) * stretch;
  // two ends rounded to whole samples, and one more tap if the first sample is odd
  const size_t most = std::min(source, static_cast<size_t>(std::ceil(support)) * 2 + 1);
  const size_t pairs = (most + 2) / 2;
  taps = array<Taps>(count);
  keep = array<size_t>(count);
  weights = array<int16_t>(count * pairs * 4);
  const auto exact = array<double>(most);
  const auto fixed = array<int32_t>(most);
  if (!taps || !keep || !weights || !exact || !fixed) return false;

  int16_t* next = weights.get();
  for (size_t i = 0; i < count; ++i) {
    const double center = (static_cast<double>(first + i) + 0.5) * scale;
    const double low = center - support + 0.5, high = center + support + 0.5;
    const size_t from = low > 0 ? static_cast<size_t>(low) : 0;
    const size_t n = std::min(std::min(static_cast<size_t>(high), source) - from, most);
    double total = 0;
    for (size_t t = 0; t < n; ++t) {
      const double x = std::fabs((static_cast<double>(t + from) - center + 0.5) * inverse);
      exact[t] = filter == Filter::bicubic ? cubic(x) : triangle(x);
      total += exact[t];
    }
    for (size_t t = 0; t < n; ++t) {
      const double w = (total != 0 ? exact[t] / total : exact[t]) * (1 << kWeightBits);
      fixed[t] = static_cast<int32_t>(w < 0 ? w - 0.5 : w + 0.5);
    }
    size_t begin = 0, stop = n;  // drops taps of weight 0 at both ends; at equal size one tap remains
    while (stop > begin + 1 && fixed[stop - 1] == 0) --stop;
    while (begin + 1 < stop && fixed[begin] == 0) ++begin;

    const size_t start = (from + begin) / 2 * 2;
    Taps& tap = taps[i];
    tap = {start, (from + stop - start + 1) / 2, next};
    for (size_t t = 0; t < tap.pairs * 2; ++t) {
      const size_t at = start + t;
      const int32_t w = at >= from + begin && at < from + stop ? fixed[at - from] : 0;
      const auto low16 = static_cast<int16_t>(w & 0xffff);
      int16_t* pair = next + t / 2 * 4 + t % 2;
      pair[0] = static_cast<int16_t>((w - low16) / 65536);
      pair[2] = low16;
    }
    next += tap.pairs * 4;
    widest = std::max(widest, tap.pairs * 2);
    end = std::max(end, std::min(start + tap.pairs * 2, source));
  }
  for (size_t i = count; i-- > 0;) keep[i] = i + 1 < count ? std::min(keep[i + 1], taps[i].first) : taps[i].first;
  return true;
}

const char* ImageToPixels::check(const Picture& p, const Placement& q) {
  if (p.height < 1 || p.width < 1 || p.height > kMaxSide || p.width > kMaxSide)
    return "a side of the picture is not within 1 to 65536";
  if (p.rows < 1 || p.first >= p.height || p.rows > p.height - p.first) return "the rows in memory are not rows of the picture";
  if ((p.pixel_stride != 3 && p.pixel_stride != 4) || p.row_stride / p.pixel_stride < p.width)
    return "pixel_stride is not 3 or 4, or row_stride is less than the pixels of a row";
  if (q.height < 1 || q.width < 1 || q.height > kMaxInput || q.width > kMaxInput)
    return "a side of the output is not within 1 to 4096";
  if (q.resized_height < 1 || q.resized_width < 1 || q.resized_height > kMaxResized || q.resized_width > kMaxResized)
    return "a side of the resized picture is not within 1 to 2^31";
  if (q.top >= q.resized_height || q.left >= q.resized_width) return "the crop is outside of the resized picture";
  return nullptr;
}

bool ImageToPixels::prepare(const Picture& picture, const Placement& placement, Filter filter, Passes passes) {
  picture_ = picture;
  placement_ = placement;
  filter_ = filter;
  passes_ = passes;
  const Placement& p = placement;
  columns_first_ = columns_first(picture.height, picture.width, p.resized_height, p.resized_width);
  if (!across_.fill(picture.width, p.resized_width, p.left, p.columns(), filter)) return false;
  if (!down_.fill(picture.height, p.resized_height, p.top, p.rows(), filter)) return false;
  const size_t from = across_.keep[0];
  return !columns_first_ || same_.fill(picture.width, picture.width, from, across_.end - from, filter);
}

namespace {

// Both passes, for the rows [first, last) of `down` and the first `count` outputs of `across`. `origin` (even) is the
// index in `across` of the picture's first column. put(quads, quad_stride, taps, c, y, x, n) computes n columns of row
// y, from column x on. The first pass takes sixteen source rows at a time. An output row is computed when all its
// source rows are ready. Only the quads that later rows need are kept.
template <class Put>
bool both(const Picture& picture, size_t origin, const ImageToPixels::Axis& across, size_t count,
          const ImageToPixels::Axis& down, size_t first, size_t last, ResizeRows* pass, const Put& put) {
  const size_t widest = std::min(kStrip, count);
  const size_t most = (widest + kQuadColumns - 1) / kQuadColumns * kQuadColumns * 4 * 3;
  const size_t room = down.widest / 4 + 2 + 4 * kBlockRows / 4;  // quads
  const Block quads = block(room * most);
  const Block scratch = block(resize_scratch(across.end - across.keep[0]) * sizeof(int16_t));
  if (!quads || !scratch) return false;

  for (size_t left = 0; left < count; left += kStrip) {
    const Taps* taps = across.taps.get() + left;
    const size_t columns = std::min(kStrip, count - left), base = across.keep[left];
    size_t end = 0;
    for (size_t i = 0; i < columns; ++i) end = std::max(end, taps[i].first + taps[i].pairs * 2);
    end = std::min(end, origin + picture.width);
    const size_t plane = (columns + kQuadColumns - 1) / kQuadColumns * kQuadColumns * 4, quad_bytes = plane * 3;

    size_t held = down.keep[first] / 4 * 4, done = held;  // source rows [held, done) are in `quads`
    for (size_t y = first; y < last; ++y) {
      const Taps& tap = down.taps[y];
      while (done < std::min(tap.first + tap.pairs * 2, picture.height)) {
        if ((done - held + kBlockRows) / 4 > room) {
          const size_t start = std::min(down.keep[y] / 4 * 4, done);
          std::memmove(quads.get(), quads.get() + (start - held) / 4 * quad_bytes, (done - start) / 4 * quad_bytes);
          held = start;
        }
        const uint8_t* rows[2 * kBlockRows];
        for (size_t r = 0; r < 2 * kBlockRows; ++r)
          rows[r] = picture.row(done + r) + (base - origin) * picture.pixel_stride;
        pass(rows, rows + kBlockRows, picture.pixel_stride, base, end - base, taps, columns,
             reinterpret_cast<int16_t*>(scratch.get()), quads.get() + (done - held) / 4 * quad_bytes, quad_bytes);
        done += kBlockRows;
      }
      const uint8_t* quad = quads.get() + (tap.first / 4 * 4 - held) / 4 * quad_bytes;
      for (size_t c = 0; c < 3; ++c) put(quad + c * plane, quad_bytes, &tap, c, y, left, columns);
    }
  }
  return true;
}

}  // namespace

bool ImageToPixels::resize(size_t first, size_t last, const Sink& sink) const {
  const auto put = [&](size_t from) {
    return [&, from](const uint8_t* quads, size_t stride, const Taps* taps, size_t c, size_t y, size_t x, size_t n) {
      const size_t at = (c * placement_.height + from + y) * placement_.width + x;
      if (sink.values)
        return passes_.columns(quads, stride, taps, n, sink.gain[c], sink.bias[c], sink.values + at, nullptr);
      uint8_t* out = sink.bytes + at;
      passes_.columns(quads, stride, taps, n, 0, 0, nullptr, out);
      for (size_t i = 0; i < n; ++i) out[i] = sink.table[c][out[i]];
    };
  };
  const size_t columns = placement_.columns();
  if (!columns_first_) return both(picture_, 0, across_, columns, down_, first, last, passes_.rows, put(0));

  // Each call of `both` does one of the two passes and copies the other axis.
  const size_t from = across_.keep[0], span = across_.end - from, rows = last - first;
  const Block between = block(rows * span * 3);  // RGB
  Axis each;
  if (!between || !each.fill(rows, rows, 0, rows, filter_)) return false;
  const auto keep = [&](const uint8_t* quads, size_t stride, const Taps* taps, size_t c, size_t y, size_t x, size_t n) {
    uint8_t line[kStrip];
    passes_.columns(quads, stride, taps, n, 0, 0, nullptr, line);
    uint8_t* out = between.get() + ((y - first) * span + x) * 3 + c;
    for (size_t i = 0; i < n; ++i) out[i * 3] = line[i];
  };
  if (!both(picture_, 0, same_, span, down_, first, last, passes_.rows, keep)) return false;
  const Picture narrow{between.get(), rows, span, span * 3, 3, 0, rows};
  return both(narrow, from, across_, columns, each, 0, rows, passes_.rows, put(first));
}

bool ImageToPixels::covers(size_t first, size_t last) const {
  last = std::min(last, placement_.rows());
  size_t begin = picture_.height, end = 0;
  for (size_t y = first; y < last; ++y) {
    const Taps& tap = down_.taps[y];
    // a tap at either end may have weight 0, because taps are pairs that start at an even index
    const int16_t *head = tap.weights, *tail = head + (tap.pairs - 1) * 4;
    begin = std::min(begin, tap.first + (head[0] == 0 && head[2] == 0));
    end = std::max(end, tap.first + tap.pairs * 2 - (tail[1] == 0 && tail[3] == 0));
  }
  return first >= last || (begin >= picture_.first && end <= picture_.first + picture_.rows);
}

bool ImageToPixels::run(size_t first, size_t last, const Sink& sink) const {
  const size_t rows = placement_.rows(), columns = placement_.columns();
  if (first < std::min(last, rows) && !resize(first, std::min(last, rows), sink)) return false;

  if (columns == placement_.width && last <= rows) return true;
  const size_t plane = placement_.height * placement_.width;
  for (size_t c = 0; c < 3; ++c)
    for (size_t y = first; y < last; ++y) {
      const size_t from = c * plane + y * placement_.width + (y < rows ? columns : 0);
      const size_t count = y < rows ? placement_.width - columns : placement_.width;
      if (sink.values) {
        float value = static_cast<float>(placement_.pad) * sink.gain[c];
        value += sink.bias[c];
        std::fill_n(sink.values + from, count, value);
      } else {
        std::fill_n(sink.bytes + from, count, sink.table[c][placement_.pad]);
      }
    }
  return true;
}

}  // namespace calmclip

// For callers without ONNX Runtime: rows [first, last) of `out`, float32 [3, height, width]. filter: 0 bilinear, 1
// bicubic. `rows`, `columns`: the kernels of one instruction set, or null for the fastest. Returns 0 if done, 1 if
// there is no memory, 2 if a number is out of range.
extern "C" __attribute__((visibility("default"))) int calmclip_image_to_pixels(
    const calmclip::Picture* picture, const calmclip::Placement* placement, int filter, const float* gain,
    const float* bias, size_t first, size_t last, float* out, calmclip::ResizeRows* rows,
    calmclip::ResizeColumns* columns) {
  using namespace calmclip;
  if (!picture || !picture->data || !placement || !gain || !bias || !out || filter < 0 || filter > 1) return 2;
  if (ImageToPixels::check(*picture, *placement) || first > last || last > placement->height) return 2;
  ImageToPixels work;
  const Passes passes{rows ? rows : kernels().resize_rows, columns ? columns : kernels().resize_columns};
  if (!work.prepare(*picture, *placement, filter ? Filter::bicubic : Filter::bilinear, passes)) return 1;
  if (!work.covers(first, last)) return 2;
  return work.run(first, last, Sink{out, gain, bias, nullptr, nullptr}) ? 0 : 1;
}
