// A depthwise convolution on uint8, channels last. Source: Jacob et al. 2017 (arXiv 1712.05877), section 2.2.
//
// Constants of the graph are prepared once, when the node's kernel is constructed; fed inputs in every run.
#include "../kernels/quant_depthwise.h"

#include <array>
#include <cmath>
#include <functional>
#include <optional>

#include "../kernels/dispatch.h"
#include "packed.h"
#include "quantized.h"

namespace calmclip {
namespace {

constexpr size_t kGrain = 1 << 20;  // products that are worth a thread: about 20 us

enum Place : size_t { kX, kXScale, kXZero, kWeight, kWeightScale, kBias, kYScale, kYZero };

const Named kOp("QuantDepthwise");

// The inputs by index: of a run, or the constants of the graph.
using Inputs = std::function<Ort::ConstValue(Place)>;

class Depthwise {
 public:
  explicit Depthwise(Ort::ConstKernelInfo info)
      : strides_(kOp.sizes<2>(info, "strides", 1)), pads_(kOp.sizes<4>(info, "pads", 0)), group_(kOp.size(info, "group", 0)) {
    bool all = true;
    const Inputs inputs = [&](Place place) { return constant(info, place); };
    for (const Place place : {kXScale, kXZero, kWeight, kWeightScale, kBias, kYScale, kYZero})
      all &= static_cast<bool>(inputs(place));
    if (inputs(kWeight)) {
      weight_.emplace(pack(inputs));
      weight_->packed = once(weight_->packed, depthwise_blocks(group_) * weight_->window.block_bytes());
      spent_.emplace(inputs(kWeight).GetTensorRawData());
    }
    if (all) channels_.emplace(channels(inputs, *weight_));
  }

  OrtStatusPtr ComputeV2(OrtKernelContext* raw) {
    return guarded([&]() -> OrtStatusPtr {
      Ort::KernelContext context(raw);
      const Inputs inputs = [&](Place place) { return context.GetInput(place); };
      std::optional<Weight> fed_weight;
      if (!weight_) fed_weight.emplace(pack(inputs));
      const Weight& weight = weight_ ? *weight_ : *fed_weight;
      std::optional<Channels> fed_channels;
      if (!channels_) fed_channels.emplace(channels(inputs, weight));
      const Channels& of = channels_ ? *channels_ : *fed_channels;

      const Input<uint8_t> x(kOp, context, kX, "x");
      const auto& window = weight.window;
      if (x.shape.size() != 4 || x.side(3) != group_)
        x.refuse("[batch, height, width, " + std::to_string(group_) + "], because group is " + std::to_string(group_));
      const int64_t down = windows(x.shape[1], pads_[0], pads_[2], window.height, strides_[0]);
      const int64_t across = windows(x.shape[2], pads_[1], pads_[3], window.width, strides_[1]);
      auto output = context.GetOutput(0, {x.shape[0], down, across, x.shape[3]});
      if (x.side(0) == 0 || down == 0 || across == 0 || group_ == 0) return nullptr;
      DepthwiseWork work{};
      work.x = x.data;
      work.y = output.GetTensorMutableData<uint8_t>();
      work.batch = x.side(0);
      work.height = x.side(1);
      work.width = x.side(2);
      work.channels = group_;
      work.out_height = static_cast<size_t>(down);
      work.out_width = static_cast<size_t>(across);
      work.top = static_cast<size_t>(pads_[0]);
      work.left = static_cast<size_t>(pads_[1]);
      work.window = window;
      work.weights = weight.packed.get();
      work.around = of.around.data();
      work.start = of.start.data();
      work.scale = of.scale.data();
      work.bias = of.bias.data();
      work.inverse = of.inverse.empty() ? nullptr : of.inverse.data();
      work.zero = of.zero.data();
      const size_t unit = work.columns() * window.rows() * window.height * window.width * std::min(group_, kBlock);
      spread(context, work.units(), kGrain / unit,
             [&](size_t first, size_t last) { kernels().quant_depthwise(work, first, last); });
      return nullptr;
    });
  }

 private:
  struct Weight {
    Window window;
    Packed packed;
    std::vector<int32_t> sums;
  };

  // Padded to whole blocks and in their order, except `around`; see DepthwiseWork. No `inverse` if a number is scaled
  // once.
  struct Channels {
    std::vector<uint8_t> around;
    std::vector<int32_t> start, zero;
    std::vector<float> scale, bias, inverse;
  };

  Weight pack(const Inputs& inputs) const {
    const Input<int8_t> weight(kOp, inputs(kWeight), "weight");
    if (weight.shape.size() != 3 || weight.side(2) != group_)
      weight.refuse("[height, width, " + std::to_string(group_) + "], because group is " + std::to_string(group_));
    const size_t height = weight.side(0), width = weight.side(1);
    if (height < 1 || width < 1 || height > kMostTaps || width > kMostTaps || height * width > kMostTaps)
      weight.refuse("a window of 1 to " + std::to_string(kMostTaps) + " taps");
    const Window window{height, width, static_cast<size_t>(strides_[0]), static_cast<size_t>(strides_[1])};
    const size_t blocks = depthwise_blocks(group_);
    Weight result{window, packed(blocks * window.block_bytes()), std::vector<int32_t>(blocks * kBlock)};
    pack_depthwise(weight.data, window, group_, result.packed.get(), result.sums.data());
    return result;
  }

  Channels channels(const Inputs& inputs, const Weight& weight) const {
    const size_t n = group_;
    const Input<float> x_scale(kOp, inputs(kXScale), "x_scale"), bias(kOp, inputs(kBias), "bias");
    const Input<float> weight_scale(kOp, inputs(kWeightScale), "weight_scale");
    const Input<uint8_t> x_zero(kOp, inputs(kXZero), "x_zero");
    const bool x_scales = x_scale.columns(n), x_zeros = x_zero.columns(n), weight_scales = weight_scale.columns(n);
    x_scale.check_scales();
    weight_scale.check_scales();
    if (bias.shape.size() != 1 || bias.side(0) != n) bias.refuse("[" + std::to_string(n) + "]");
    const Steps steps({kOp, inputs(kYScale), "y_scale"}, {kOp, inputs(kYZero), "y_zero"}, n);
    const size_t padded = weight.sums.size();
    Channels result{std::vector<uint8_t>(n), weight.sums, std::vector<int32_t>(padded), {}, {}, {}};
    for (auto* numbers : {&result.scale, &result.bias, &result.inverse}) numbers->resize(padded);
    for (size_t c = 0; c < n; ++c) {
      const size_t at = c / kBlock * kBlock + depthwise_place(c), step = steps.zero.size() == n ? c : 0;
      result.around[c] = x_zero.data[x_zeros ? c : 0];
      result.start[at] = static_cast<int32_t>(uint32_t{0} - result.around[c] * static_cast<uint32_t>(result.start[at]));
      result.scale[at] = x_scale.data[x_scales ? c : 0] * weight_scale.data[weight_scales ? c : 0];
      result.bias[at] = bias.data[c];
      result.inverse[at] = steps.inverse[step];
      result.zero[at] = steps.zero[step];
    }
    scale_once(result, weight.window.height * weight.window.width);
    return result;
  }

  // Scales to steps of y at once, if no number leaves the range of a conversion to int32. A number is a sum of `taps`.
  static void scale_once(Channels& channels, size_t taps) {
    std::vector<float> scale(channels.scale), bias(channels.bias);
    for (size_t at = 0; at < scale.size(); ++at) {
      const double step = double{scale[at]} * channels.inverse[at], middle = double{bias[at]} * channels.inverse[at];
      if (!(255.0 * 128 * static_cast<double>(taps) * step + std::abs(middle) < 1 << 30)) return;
      scale[at] = static_cast<float>(step);
      bias[at] = static_cast<float>(middle);
    }
    channels.scale = std::move(scale);
    channels.bias = std::move(bias);
    channels.inverse.clear();
  }

  std::array<int64_t, 2> strides_;
  std::array<int64_t, 4> pads_;
  size_t group_;
  std::optional<Weight> weight_;
  std::optional<Spent> spent_;
  std::optional<Channels> channels_;
};

struct Schema : Op<Schema, Depthwise> {
  static constexpr const char* kOpName = "QuantDepthwise";
  static constexpr Type kInputTypes[] = {kUint8, kFloat, kUint8, kInt8, kFloat, kFloat, kFloat, kUint8};
  static constexpr Type kOutputTypes[] = {kUint8};

  // [B, H', W', C], as far as known
  static OrtStatusPtr infer(OrtShapeInferContext* context) {
    Known y = Known::input(context, kX);
    const Known weight = Known::input(context, kWeight);
    const auto strides = known_attribute<2>(context, "strides", ORT_OP_ATTR_INTS);
    const auto pads = known_attribute<4>(context, "pads", ORT_OP_ATTR_INTS);
    if (y.dims.size() != 4 || strides.empty() || pads.empty() || strides[0] < 1 || strides[1] < 1) return nullptr;
    for (size_t i = 0; i < 2; ++i) {
      const bool known = y.dims[1 + i] >= 0 && weight.dims.size() == 3 && weight.dims[i] >= 0;
      y.set(1 + i, known ? windows(y.dims[1 + i], pads[i], pads[2 + i], weight.dims[i], strides[i]) : -1);
    }
    return y.output(context, 0, kUint8);
  }
};

}  // namespace

DEFINE_OP(quant_depthwise, Schema)

}  // namespace calmclip
