// Pixels quantized and cut into windows: the operand of a convolution as a matrix product.
#include "../kernels/dispatch.h"
#include "quantized.h"

namespace calmclip {
namespace {

constexpr size_t kGrain = 65536;   // bytes that are worth a thread: about 6 us
constexpr int64_t kMost = 65536;   // the largest value of any attribute
constexpr int64_t kStraight = 16;  // columns of a patch; for fewer columns, quantizing whole lines first is faster

enum Place { kX, kYScale, kYZero };

const Named kOp("QuantPatches");

// The number of windows of `size` that fit into `side` with `before` and `after` around it.
constexpr int64_t fit(int64_t side, int64_t before, int64_t after, int64_t size, int64_t stride) {
  const int64_t more = side + before + after - size;
  return more < 0 ? 0 : more / (stride ? stride : size) + 1;
}

class Patches {
 public:
  explicit Patches(Ort::ConstKernelInfo info)
      : patch_(sides(info, "patch", {}, 2, 1, "a height and a width")),
        strides_(sides(info, "strides", {0, 0}, 2, 0, "a stride down and one to the right")),
        pads_(sides(info, "pads", {0, 0, 0, 0}, 4, 0, "top, left, bottom and right")) {
    for (size_t axis = 0; axis < 2; ++axis)
      if (strides_[axis] == 0) strides_[axis] = patch_[axis];
    straight_ = strides_ == patch_ && pads_ == std::vector<int64_t>(4) && patch_[1] >= kStraight;
  }

  OrtStatusPtr ComputeV2(OrtKernelContext* raw) {
    return guarded([&]() -> OrtStatusPtr {
      Ort::KernelContext context(raw);
      const Input<float> x(kOp, context, kX, "x"), y_scale(kOp, context, kYScale, "y_scale");
      const Input<uint8_t> y_zero(kOp, context, kYZero, "y_zero");
      if (x.shape.size() != 4) x.refuse("[batch, channels, height, width]");
      const float inverse = 1 / y_scale.scale();
      const uint8_t zero = y_zero.number();
      const int64_t down = fit(x.shape[2], pads_[0], pads_[2], patch_[0], strides_[0]);
      const int64_t across = fit(x.shape[3], pads_[1], pads_[3], patch_[1], strides_[1]);
      const int64_t numbers = x.shape[1] * patch_[0] * patch_[1];
      auto output = context.GetOutput(0, {x.shape[0], down * across, numbers});
      if (across * numbers == 0) return nullptr;
      const Work work{x, output.GetTensorMutableData<uint8_t>(), inverse, zero, static_cast<size_t>(down),
                      static_cast<size_t>(across), static_cast<size_t>(numbers)};
      // a unit is one row of windows
      spread(context, x.side(0) * work.down, kGrain / (work.across * work.numbers), [&](size_t first, size_t last) {
        straight_ ? quantize_straight(work, first, last) : quantize_lines(work, first, last);
      });
      return nullptr;
    });
  }

 private:
  struct Work {
    const Input<float>& x;
    uint8_t* y;
    float inverse;
    uint8_t zero;
    size_t down, across, numbers;  // windows, and the bytes of each

    const float* row(size_t image, size_t channel, size_t line) const {
      return x.data + ((image * x.side(1) + channel) * x.side(2) + line) * x.side(3);
    }
  };

  // If no pixel is in two windows: directly to its position in its window.
  void quantize_straight(const Work& work, size_t first, size_t last) const {
    const auto high = static_cast<size_t>(patch_[0]), wide = static_cast<size_t>(patch_[1]);
    for (size_t unit = first; unit < last; ++unit)
      for (size_t i = 0; i < work.x.side(1) * high; ++i)
        kernels().quant_patches(work.row(unit / work.down, i / high, unit % work.down * high + i % high), wide,
                                work.across, work.y + unit * work.across * work.numbers + i * wide, work.numbers,
                                work.inverse, work.zero);
  }

  // Quantizes each pixel once into lines of bytes with left and right margins, then copies windows out of the lines.
  // Each channel has as many lines as a window is high; lines that the next row of windows shares stay in place.
  void quantize_lines(const Work& work, size_t first, size_t last) const {
    const auto high = static_cast<size_t>(patch_[0]), wide = static_cast<size_t>(patch_[1]);
    const size_t lines = work.x.side(1) * high;
    const size_t pitch = static_cast<size_t>(pads_[1] + work.x.shape[3] + pads_[3]) + kPastLine;
    std::vector<uint8_t> bytes((lines + 1) * pitch, work.zero);  // the last line: a row of padding
    const auto line = [&](size_t channel, int64_t row) {
      return &bytes[(channel * high + static_cast<size_t>(row) % high) * pitch];
    };
    std::vector<const uint8_t*> window(lines);
    int64_t ready = 0;  // rows of the image above this one are quantized
    for (size_t unit = first; unit < last; ++unit) {
      const size_t image = unit / work.down;
      const int64_t top = static_cast<int64_t>(unit % work.down) * strides_[0] - pads_[0];
      ready = std::max({unit % work.down ? ready : 0, top, int64_t{0}});
      for (; ready < std::min(top + patch_[0], work.x.shape[2]); ++ready)
        for (size_t channel = 0; channel < work.x.side(1); ++channel)
          kernels().quant_patches(work.row(image, channel, static_cast<size_t>(ready)), work.x.side(3), 1,
                                  line(channel, ready) + pads_[1], 0, work.inverse, work.zero);
      for (size_t i = 0; i < lines; ++i) {
        const int64_t row = top + static_cast<int64_t>(i % high);
        window[i] = row < 0 || row >= work.x.shape[2] ? &bytes[lines * pitch] : line(i / high, row);
      }
      kernels().cut_windows({window.data(), lines, wide, static_cast<size_t>(strides_[1]), work.across,
                             work.y + unit * work.across * work.numbers});
    }
  }

  // An attribute of `count` integers, each at least `least`; `otherwise` if the node does not have it.
  static std::vector<int64_t> sides(Ort::ConstKernelInfo info, const char* name, const std::vector<int64_t>& otherwise,
                                    size_t count, int64_t least, const char* expected) {
    std::vector<int64_t> values;
    try {
      values = info.GetAttributes<int64_t>(name);
    } catch (const Ort::Exception& error) {
      if (otherwise.empty()) kOp.invalid("the attribute " + std::string(name) + " cannot be read: " + error.what());
      return otherwise;
    }
    if (values.size() != count || *std::min_element(values.begin(), values.end()) < least ||
        *std::max_element(values.begin(), values.end()) > kMost)
      kOp.invalid(std::string(name) + " is " + text(values) + "; expected " + expected + ", up to " +
                  std::to_string(kMost));
    return values;
  }

  std::vector<int64_t> patch_, strides_, pads_;
  bool straight_;
};

struct Schema : Op<Schema, Patches> {
  static constexpr const char* kOpName = "QuantPatches";
  static constexpr Type kInputTypes[] = {kFloat, kFloat, kUint8}, kOutputTypes[] = {kUint8};

  // [B, P, K], as far as known
  static OrtStatusPtr infer(OrtShapeInferContext* context) {
    const Known x = Known::input(context, kX);
    const auto patch = known_attribute<2>(context, "patch", ORT_OP_ATTR_INTS);
    auto strides = known_attribute<2>(context, "strides", ORT_OP_ATTR_INTS);
    auto pads = known_attribute<4>(context, "pads", ORT_OP_ATTR_INTS);
    if (strides.empty()) strides = {0, 0};
    if (pads.empty()) pads = {0, 0, 0, 0};
    if (x.dims.size() != 4 || patch.empty() || std::min(patch[0], patch[1]) < 1 ||
        std::min(strides[0], strides[1]) < 0)
      return nullptr;
    Known y{{x.dims[0], -1, -1}, {x.names[0], "", ""}};
    if (x.dims[2] >= 0 && x.dims[3] >= 0)
      y.dims[1] = fit(x.dims[2], pads[0], pads[2], patch[0], strides[0]) *
                  fit(x.dims[3], pads[1], pads[3], patch[1], strides[1]);
    if (x.dims[1] >= 0) y.dims[2] = x.dims[1] * patch[0] * patch[1];
    return y.output(context, 0, kUint8);
  }
};

}  // namespace

DEFINE_OP(quant_patches, Schema)

}  // namespace calmclip
