// A convolution on uint8, channels last. Source: Jacob et al. 2017 (arXiv 1712.05877), 2.2.
//
// Constants of the graph are prepared once, when the node's kernel is constructed; fed inputs in every run.
#include "../kernels/quant_conv.h"

#include <functional>
#include <memory>
#include <optional>

#include "../kernels/dispatch.h"
#include "linear_columns.h"
#include "packed.h"
#include "quantized.h"

namespace calmclip {
namespace {

constexpr size_t kGrain = 2 << 20;   // products that are worth a thread
constexpr size_t kNear = 256 << 10;  // bytes of x at a time, a part of an L2 cache, because every panel reads them again

constexpr size_t kMostTileWords = 1 << 20;  // more weights of tiles come too slowly from the third cache
constexpr size_t kFewTiles = 24;            // of a picture; for fewer, too few products share a weight
constexpr size_t kFewBlocks = 4;            // of tiles, for a thread: each part has room of its own

enum Place : size_t { kX, kXScale, kXZero, kWeight, kWeightScale, kBias, kYScale, kYZero };

const Named kOp("QuantConv");

// The inputs by index: of a run, or the constants of the graph.
using Inputs = std::function<Ort::ConstValue(Place)>;

class Conv {
 public:
  explicit Conv(Ort::ConstKernelInfo info)
      : strides_(kOp.sizes<2>(info, "strides", 1)), pads_(kOp.sizes<4>(info, "pads", 0)) {
    bool all = true;
    const Inputs inputs = [&](Place place) { return constant(info, place); };
    for (const Place place : {kXScale, kXZero, kWeight, kWeightScale, kBias, kYScale, kYZero})
      all &= static_cast<bool>(inputs(place));
    if (inputs(kWeight)) {
      weight_.emplace(pack(inputs, true));
      pack_tiles(inputs);
      spent_.emplace(inputs(kWeight).GetTensorRawData());
    }
    if (all) columns_.emplace(columns(inputs, *weight_));
  }

  OrtStatusPtr ComputeV2(OrtKernelContext* raw) {
    return guarded([&]() -> OrtStatusPtr {
      Ort::KernelContext context(raw);
      const Inputs inputs = [&](Place place) { return context.GetInput(place); };
      std::optional<Weight> fed_weight;
      if (!weight_) fed_weight.emplace(pack(inputs, false));
      const Weight& weight = weight_ ? *weight_ : *fed_weight;
      std::optional<LinearColumns> fed_columns;
      if (!columns_) fed_columns.emplace(columns(inputs, weight));
      const LinearColumns& of = columns_ ? *columns_ : *fed_columns;

      const Input<uint8_t> x(kOp, context, kX, "x");
      if (x.shape.size() != 4 || x.side(3) != weight.channels)
        x.refuse("[batch, height, width, " + std::to_string(weight.channels) + "], because the weight is " +
                 weight.text());
      const int64_t down = windows(x.shape[1], pads_[0], pads_[2], static_cast<int64_t>(weight.high), strides_[0]);
      const int64_t across = windows(x.shape[2], pads_[1], pads_[3], static_cast<int64_t>(weight.wide), strides_[1]);
      auto y = context.GetOutput(0, {x.shape[0], down, across, static_cast<int64_t>(weight.n)});
      if (x.side(0) == 0 || down == 0 || across == 0 || weight.n == 0) return nullptr;
      ConvWork work{};
      of.fill(work.of);
      work.of.n = weight.n;
      work.of.panels = weight.panels.get();
      work.of.x = x.data;
      work.of.bytes = y.GetTensorMutableData<uint8_t>();
      work.height = x.side(1);
      work.width = x.side(2);
      work.channels = weight.channels;
      work.out_height = static_cast<size_t>(down);
      work.out_width = static_cast<size_t>(across);
      work.top = static_cast<size_t>(pads_[0]);
      work.left = static_cast<size_t>(pads_[1]);
      work.high = weight.high;
      work.wide = weight.wide;
      work.down = static_cast<size_t>(strides_[0]);
      work.across = static_cast<size_t>(strides_[1]);
      work.around = of.around;
      weight.words && worth_tiles(work) ? run_tiles(context, work, x.side(0), weight.words.get())
                                        : run(context, work, x.side(0) * work.out_height);
      return nullptr;
    });
  }

 private:
  struct Weight {
    size_t high, wide, channels, n;
    Packed panels;
    std::vector<int32_t> sums;
    std::shared_ptr<int16_t> words;  // of tiles, if they fit

    std::string text() const {
      return calmclip::text({static_cast<int64_t>(high), static_cast<int64_t>(wide), static_cast<int64_t>(channels),
                             static_cast<int64_t>(n)});
    }
  };

  static Weight pack(const Inputs& inputs, bool constant) {
    const Input<int8_t> weight(kOp, inputs(kWeight), "weight");
    if (weight.shape.size() != 4) weight.refuse("[height, width, C, N]");
    const size_t high = weight.side(0), wide = weight.side(1), channels = weight.side(2), n = weight.side(3);
    if (high < 1 || wide < 1) weight.refuse("a window of at least 1 x 1");
    for (const size_t side : {high, wide, channels})
      if (side > kMostK) weight.refuse("at most " + std::to_string(kMostK) + " products a number");
    const size_t rows = 4 * conv_steps(wide, channels);
    if (wide * channels > kMostK || high * rows > kMostK)
      weight.refuse("at most " + std::to_string(kMostK) + " products a number");
    const size_t bytes = linear_panels(n) * high * rows * kPanel;
    Weight result{high, wide, channels, n, packed(bytes), {}, nullptr};
    result.sums.resize(linear_panels(n) * kPanel);
    pack_conv(weight.data, high, wide, channels, n, result.panels.get(), result.sums.data());
    if (constant) result.panels = once(result.panels, bytes);
    return result;
  }

  // Constant weights alone: to pack them takes as long as some runs.
  void pack_tiles(const Inputs& inputs) {
    Weight& of = *weight_;
    const size_t words = conv_tile_words(of.channels, of.n);
    const bool fits = kTilesPay && of.high == 3 && of.wide == 3 && strides_ == std::array<int64_t, 2>{1, 1} && of.n > 0 &&
                      of.channels > 0 && of.channels % kTileChannels == 0 && of.n >= kTileChannels && words <= kMostTileWords;
    if (!fits) return;
    const Packed packed_words = packed(words * sizeof(int16_t));
    auto* const at = reinterpret_cast<int16_t*>(packed_words.get());
    if (!pack_conv_tiles(inputs(kWeight).GetTensorData<int8_t>(), of.channels, of.n, at)) return;
    const Packed shared = once(packed_words, words * sizeof(int16_t));
    of.words = {shared, reinterpret_cast<int16_t*>(shared.get())};
  }

  static size_t tiles(size_t side) { return (side + kTile - 1) / kTile; }

  // Tiles at the border compute places outside of y, and tiles read eight times as many bytes of weights.
  static bool worth_tiles(const ConvWork& work) {
    const size_t count = tiles(work.out_height) * tiles(work.out_width);
    return count >= kFewTiles && 4 * count * kTile * kTile <= 5 * work.out_height * work.out_width;
  }

  static void run_tiles(Ort::KernelContext& context, const ConvWork& work, size_t batch, const int16_t* words) {
    const size_t total = batch * tiles(work.out_height) * tiles(work.out_width);
    const size_t blocks = (total + kTileBlock - 1) / kTileBlock;
    const size_t macs = kTileBlock * kTilePlaces * work.channels * work.of.n;  // of a block
    spread(context, blocks, std::max(kFewBlocks, kGrain / macs), [&](size_t first, size_t last) {
      const auto x = std::make_unique_for_overwrite<int16_t[]>(kTilePlaces * kTileBlock * work.channels);
      const auto sums = std::make_unique_for_overwrite<int32_t[]>(kTilePlaces * kTileBlock * kPanel);
      const auto room = std::make_unique_for_overwrite<uint8_t[]>(kTilePlaces * work.channels);
      const size_t end = std::min(total, last * kTileBlock);
      kernels().quant_conv_tiles(work, {words, first * kTileBlock, end, x.get(), sums.get(), room.get()});
    });
  }

  static LinearColumns columns(const Inputs& inputs, const Weight& weight) {
    const Scaling scaling{kOp, inputs(kXScale), inputs(kXZero), inputs(kWeightScale), inputs(kBias)};
    LinearColumns result(scaling, weight.sums, weight.n);
    const Steps steps({kOp, inputs(kYScale), "y_scale"}, {kOp, inputs(kYZero), "y_zero"}, weight.n);
    result.quantize(steps, weight.n, weight.high * weight.wide * weight.channels, false);
    return result;
  }

  // Computes all panels for a block of rows of y whose windows fit the cache, then for the next rows.
  static void run(Ort::KernelContext& context, const ConvWork& work, size_t rows) {
    const size_t panels = linear_panels(work.of.n), line = work.width * work.channels * std::min(work.down, work.high);
    const size_t chunks = std::clamp<size_t>((rows * line + kNear - 1) / kNear, 1, rows);
    const size_t macs = work.out_width * work.panel_bytes();  // of a row in a panel
    spread(context, chunks * panels, kGrain / (rows / chunks * macs), [&](size_t first, size_t last) {
      std::vector<const uint8_t*> lines(work.high);
      std::vector<uint8_t> room((work.high + 1) * work.line_bytes());
      while (first < last) {
        const size_t chunk = first / panels, panel = first % panels, end = std::min(panels, panel + last - first);
        kernels().quant_conv(
            work, {rows * chunk / chunks, rows * (chunk + 1) / chunks, panel, end, lines.data(), room.data()});
        first += end - panel;
      }
    });
  }

  std::array<int64_t, 2> strides_;
  std::array<int64_t, 4> pads_;
  std::optional<Weight> weight_;
  std::optional<Spent> spent_;
  std::optional<LinearColumns> columns_;
};

struct Schema : Op<Schema, Conv> {
  static constexpr const char* kOpName = "QuantConv";
  static constexpr Type kInputTypes[] = {kUint8, kFloat, kUint8, kInt8, kFloat, kFloat, kFloat, kUint8};
  static constexpr Type kOutputTypes[] = {kUint8};

  // [B, H', W', N], as far as known
  static OrtStatusPtr infer(OrtShapeInferContext* context) {
    Known y = Known::input(context, kX);
    const Known weight = Known::input(context, kWeight);
    const auto strides = known_attribute<2>(context, "strides", ORT_OP_ATTR_INTS);
    const auto pads = known_attribute<4>(context, "pads", ORT_OP_ATTR_INTS);
    if (y.dims.size() != 4 || weight.dims.size() != 4 || strides.empty() || pads.empty() || strides[0] < 1 ||
        strides[1] < 1)
      return nullptr;
    for (size_t i = 0; i < 2; ++i) {
      const bool known = y.dims[1 + i] >= 0 && weight.dims[i] >= 0;
      y.set(1 + i, known ? windows(y.dims[1 + i], pads[i], pads[2 + i], weight.dims[i], strides[i]) : -1);
    }
    y.dims[3] = weight.dims[3];
    y.names[3] = weight.names[3];
    return y.output(context, 0, kUint8);
  }
};

}  // namespace

DEFINE_OP(quant_conv, Schema)

}  // namespace calmclip
