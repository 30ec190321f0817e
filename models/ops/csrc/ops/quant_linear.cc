// A linear layer on uint8, its activation, and uint8 again or float32 with a residual added. Source: Jacob et al. 2017
// (arXiv 1712.05877), section 2.2.
//
// There are four operators: QuantLinear; QuantLinearToFloat, because the type of an output must follow from the types
// of the inputs; QuantPointwise and QuantRowsLinear, which have other function bodies. Constants of the graph are prepared once, when the
// node's kernel is constructed; fed inputs in every run.
#include "../kernels/quant_linear.h"

#include <array>
#include <cstring>
#include <functional>
#include <optional>

#include "../kernels/activation_curve.h"
#include "../kernels/dispatch.h"
#include "linear_columns.h"
#include "packed.h"
#include "quantized.h"

namespace calmclip {
namespace {

constexpr size_t kGrain = 2 << 20;   // products that are worth a thread
constexpr size_t kFewRows = 8;       // fewer rows take as long: the time is that of the weights
constexpr size_t kNear = 256 << 10;  // bytes of x at a time, a part of an L2 cache, because every panel reads them again

enum Kind : size_t { kToBytes, kToFloat, kPointwise, kRows };
constexpr const char* kName[] = {"QuantLinear", "QuantLinearToFloat", "QuantPointwise", "QuantRowsLinear"};
enum Place : size_t { kX, kXScale, kXZero, kWeight, kWeightScale, kBias, kYScale, kYZero, kResidual = kYScale };

// The inputs by index: of a run, or the constants of the graph.
using Inputs = std::function<Ort::ConstValue(Place)>;

template <Kind kind>
class Linear {
  static constexpr bool to_float = kind == kToFloat || kind == kRows;

 public:
  explicit Linear(Ort::ConstKernelInfo info) : activation_(activation(info)), gated_(gated(info)) {
    bool all = true;
    const Inputs inputs = [&](Place place) { return constant(info, place); };
    for (const Place place : kFixed) all &= static_cast<bool>(inputs(place));
    if (inputs(kWeight)) {
      weight_.emplace(pack(inputs, gated_));
      if (reads_order()) weight_->sort();
      weight_->panels = once(weight_->panels, weight_->bytes());
      spent_.emplace(inputs(kWeight).GetTensorRawData());
    }
    if (all) columns_.emplace(columns(inputs, *weight_, activation_));
  }

  OrtStatusPtr ComputeV2(OrtKernelContext* raw) {
    return guarded([&]() -> OrtStatusPtr {
      Ort::KernelContext context(raw);
      const Inputs inputs = [&](Place place) { return context.GetInput(place); };
      std::optional<Weight> fed_weight;
      if (!weight_) fed_weight.emplace(pack(inputs, gated_));
      const Weight& weight = weight_ ? *weight_ : *fed_weight;
      std::optional<LinearColumns> fed_columns;
      if (!columns_) fed_columns.emplace(columns(inputs, weight, activation_));
      const LinearColumns& of = columns_ ? *columns_ : *fed_columns;

      const Input<uint8_t> x(kOp, context, kX, "x");
      if (x.shape.empty() || x.shape.back() != static_cast<int64_t>(weight.k))
        x.refuse("[..., " + std::to_string(weight.k) + "], because the weight is " + weight.text());
      if (kind == kPointwise && x.shape.size() != 4) x.refuse("[B, H, W, " + std::to_string(weight.k) + "]");
      auto shape = x.shape;
      shape.back() = static_cast<int64_t>(weight.answers());
      LinearWork work{};
      work.rows = 1;
      for (size_t i = 0; i + 1 < shape.size(); ++i) work.rows *= static_cast<size_t>(shape[i]);
      if constexpr (to_float) {
        const Input<float> residual(kOp, context, kResidual, "residual");
        work.one_residual = residual.shape.size() <= 1 && residual.count == 1;
        if (!work.one_residual && residual.shape != shape)
          residual.refuse("that of y, " + text(shape) + ", or one number");
        work.residual = residual.data;
      }
      if constexpr (kind == kRows) {
        const Input<float> steps(kOp, context, kXScale, "x_scale");
        auto each = x.shape;
        each.back() = 1;
        if (steps.shape != each) steps.refuse(text(each) + ", one number for each row of x");
        steps.check_scales();
        work.row_scale = steps.data;
      }
      auto y = context.GetOutput(0, shape);
      if (work.rows == 0 || weight.answers() == 0) return nullptr;
      if constexpr (to_float)
        work.values = y.template GetTensorMutableData<float>();
      else
        work.bytes = y.template GetTensorMutableData<uint8_t>();
      work.x = x.data;
      work.k = weight.k;
      work.n = weight.answers();
      work.gated = weight.gated;
      work.panels = weight.panels.get();
      work.order = weight.order.empty() ? nullptr : weight.order.data();
      of.fill(work);
      work.activation = activation_;
      run(context, work);
      return nullptr;
    });
  }

 private:
  inline static const Named kOp{kName[kind]};
  static constexpr auto kFixed = [] {
    if constexpr (kind == kRows)
      return std::array{kXZero, kWeight, kWeightScale, kBias};
    else if constexpr (to_float)
      return std::array{kXScale, kXZero, kWeight, kWeightScale, kBias};
    else
      return std::array{kXScale, kXZero, kWeight, kWeightScale, kBias, kYScale, kYZero};
  }();

  struct Weight {
    size_t k, n;
    bool gated;
    Packed panels;
    std::vector<int32_t> sums;
    std::vector<uint16_t> order;  // or none; sorting takes longer than a product

    size_t count() const { return sums.size() / kPanel; }

    void sort() {
      order.resize(count() * linear_order_numbers(k));
      order_linear(panels.get(), k, count(), order.data());
    }

    size_t answers() const { return gated ? n / 2 : n; }  // columns of y
    size_t bytes() const { return (gated ? gated_panels(n / 2) : linear_panels(n)) * linear_panel_bytes(k); }

    std::string text() const { return "[" + std::to_string(k) + ", " + std::to_string(n) + "]"; }
  };

  static int32_t activation(Ort::ConstKernelInfo info) {
    if (kind == kPointwise) return kNone;
    const auto code = kOp.attribute<int64_t>(info, "activation");
    if (code < kNone || code > kSilu)
      kOp.invalid("activation is " + std::to_string(code) +
                  "; expected 0 none, 1 relu, 2 gelu, 3 gelu_tanh, 4 quick_gelu or 5 silu");
    return static_cast<int32_t>(code);
  }

  static bool gated(Ort::ConstKernelInfo info) {
    if (kind != kRows) return false;
    const auto code = kOp.attribute<int64_t>(info, "gated");
    if (code != 0 && code != 1) kOp.invalid("gated is " + std::to_string(code) + "; expected 0 or 1");
    return code == 1;
  }

  static Weight pack(const Inputs& inputs, bool gated) {
    const Input<int8_t> weight(kOp, inputs(kWeight), "weight");
    if (weight.shape.size() != 2) weight.refuse("[K, N]");
    const size_t k = weight.side(0), n = weight.side(1);
    if (k > kMostK) weight.refuse("at most " + std::to_string(kMostK) + " rows");
    if (gated && n % 2) weight.refuse("an even number of columns, because half of them gate the others");
    const size_t panels = gated ? gated_panels(n / 2) : linear_panels(n);
    Weight result{k, n, gated, nullptr, {}, {}};
    result.panels = packed(result.bytes());
    result.sums.resize(panels * kPanel);
    if (gated) {
      std::vector<int8_t> together(k * panels * kPanel);
      for (size_t row = 0; row < k; ++row)
        for (size_t i = 0; i < n; ++i) together[row * panels * kPanel + gated_place(i, n)] = weight.data[row * n + i];
      pack_linear(together.data(), k, panels * kPanel, result.panels.get(), result.sums.data());
    } else {
      pack_linear(weight.data, k, n, result.panels.get(), result.sums.data());
    }
    return result;
  }

  static LinearColumns columns(const Inputs& inputs, const Weight& weight, int32_t activation) {
    const Ort::ConstValue none{nullptr};
    const Scaling scaling{kOp, kind == kRows ? none : inputs(kXScale), inputs(kXZero), inputs(kWeightScale), inputs(kBias)};
    LinearColumns result(scaling, weight.sums, weight.n);
    if (weight.gated) result.interleave(weight.n);
    if constexpr (!to_float) {
      const Steps steps({kOp, inputs(kYScale), "y_scale"}, {kOp, inputs(kYZero), "y_zero"}, weight.n);
      const auto floor = activation <= kRelu ? std::optional(activation == kRelu) : std::nullopt;
      result.quantize(steps, weight.n, weight.k, floor);
    }
    return result;
  }

  // Computes all panels for a block of rows that fits the cache, then for the next rows.
  static void run(Ort::KernelContext& context, const LinearWork& work) {
    const size_t panels = work.gated ? gated_panels(work.n) : linear_panels(work.n), parts = (work.rows * work.k + kNear - 1) / kNear;
    const size_t chunks = std::clamp<size_t>(parts, 1, work.rows), rows = work.rows / chunks;
    const size_t grain = kGrain / (std::max(rows, kFewRows) * std::max<size_t>(work.k, 1) * kPanel);
    spread(context, chunks * panels, grain, [&](size_t first, size_t last) {
      while (first < last) {
        const size_t chunk = first / panels, panel = first % panels;
        const size_t end = std::min(panels, panel + last - first), row = work.rows * chunk / chunks;
        LinearWork part = work;
        part.rows = work.rows * (chunk + 1) / chunks - row;
        part.x += row * work.k;
        if (part.residual && !part.one_residual) part.residual += row * work.n;
        if (part.values) part.values += row * work.n;
        if (part.row_scale) part.row_scale += row;
        if (part.bytes) part.bytes += row * work.n;
        kernels().quant_linear(part, panel, end);
        first += end - panel;
      }
    });
  }

  int32_t activation_;
  bool gated_;
  std::optional<Weight> weight_;
  std::optional<Spent> spent_;
  std::optional<LinearColumns> columns_;
};

template <bool to_float>
struct Types {
  static constexpr Type kInputTypes[] = {kUint8, kFloat, kUint8, kInt8, kFloat, kFloat, kFloat, kUint8};
  static constexpr Type kOutputTypes[] = {kUint8};
};

template <>
struct Types<true> {
  static constexpr Type kInputTypes[] = {kUint8, kFloat, kUint8, kInt8, kFloat, kFloat, kFloat};
  static constexpr Type kOutputTypes[] = {kFloat};
  static inline int in_place[] = {kResidual};
};

template <Kind kind>
struct Schema : Op<Schema<kind>, Linear<kind>>, Types<kind == kToFloat || kind == kRows> {
  static constexpr const char* kOpName = kName[kind];

  // The shape of x with the last dimension of the weight; nothing if either rank is unknown.
  static OrtStatusPtr infer(OrtShapeInferContext* context) {
    Known y = Known::input(context, kX);
    const Known weight = Known::input(context, kWeight);
    if (y.dims.empty() || weight.dims.size() != 2) return nullptr;
    y.dims.back() = weight.dims[1];
    y.names.back() = weight.names[1];
    if constexpr (kind == kRows) {
      const auto gated = known_attribute<1>(context, "gated", ORT_OP_ATTR_INT);
      if (gated.empty()) return nullptr;
      if (gated[0]) y.set(y.dims.size() - 1, y.dims.back() < 0 ? -1 : y.dims.back() / 2);
    }
    return y.output(context, 0, kind == kToFloat || kind == kRows ? kFloat : kUint8);
  }
};

}  // namespace

DEFINE_OP(quant_linear, Schema<kToBytes>)
DEFINE_OP(quant_pointwise, Schema<kPointwise>)
DEFINE_OP(quant_linear_to_float, Schema<kToFloat>)
DEFINE_OP(quant_rows_linear, Schema<kRows>)

}  // namespace calmclip
