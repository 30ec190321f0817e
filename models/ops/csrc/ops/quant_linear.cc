// A linear layer on bytes, its activation, and either bytes again or float32 with a residual added.
// Source: Jacob et al. 2017 (arXiv 1712.05877), section 2.2.
//
// Three operators: QuantLinear; QuantLinearToFloat, for an output's type follows from the inputs' types; QuantPointwise,
// which has another body.
// What a graph holds as constants is made ready once, when its node's kernel is made; what is fed, in every run.
#include "../kernels/quant_linear.h"

#include <array>
#include <cmath>
#include <cstring>
#include <functional>
#include <optional>

#include "../kernels/activation_curve.h"
#include "../kernels/dispatch.h"
#include "packed.h"
#include "quantized.h"

namespace calmclip {
namespace {

constexpr size_t kGrain = 2 << 20;   // products that are worth a thread
constexpr size_t kFewRows = 8;       // fewer take as long: it is the weights that take their time
constexpr size_t kNear = 256 << 10;  // bytes of x at a time, for they are read once a panel: a part of an L2 cache

enum Kind : size_t { kToBytes, kToFloat, kPointwise };
constexpr const char* kName[] = {"QuantLinear", "QuantLinearToFloat", "QuantPointwise"};
enum Place : size_t { kX, kXScale, kXZero, kWeight, kWeightScale, kBias, kYScale, kYZero, kResidual = kYScale };

// The inputs by their places: of a run, or the constants among them.
using Inputs = std::function<Ort::ConstValue(Place)>;

template <Kind kind>
class Linear {
  static constexpr bool to_float = kind == kToFloat;

 public:
  explicit Linear(Ort::ConstKernelInfo info) : activation_(activation(info)) {
    bool all = true;
    const Inputs inputs = [&](Place place) { return constant(info, place); };
    for (const Place place : kFixed) all &= static_cast<bool>(inputs(place));
    if (inputs(kWeight)) weight_.emplace(pack(inputs));
    if (all) columns_.emplace(columns(inputs, *weight_, activation_));
  }

  OrtStatusPtr ComputeV2(OrtKernelContext* raw) {
    return guarded([&]() -> OrtStatusPtr {
      Ort::KernelContext context(raw);
      const Inputs inputs = [&](Place place) { return context.GetInput(place); };
      std::optional<Weight> fed_weight;
      if (!weight_) fed_weight.emplace(pack(inputs));
      const Weight& weight = weight_ ? *weight_ : *fed_weight;
      std::optional<Columns> fed_columns;
      if (!columns_) fed_columns.emplace(columns(inputs, weight, activation_));
      const Columns& of = columns_ ? *columns_ : *fed_columns;

      const Input<uint8_t> x(kOp, context, kX, "x");
      if (x.shape.empty() || x.shape.back() != static_cast<int64_t>(weight.k))
        x.refuse("[..., " + std::to_string(weight.k) + "], for the weight is " + weight.text());
      if (kind == kPointwise && x.shape.size() != 4) x.refuse("[B, H, W, " + std::to_string(weight.k) + "]");
      auto shape = x.shape;
      shape.back() = static_cast<int64_t>(weight.n);
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
      auto y = context.GetOutput(0, shape);
      if (work.rows == 0 || weight.n == 0) return nullptr;
      if constexpr (to_float)
        work.values = y.template GetTensorMutableData<float>();
      else
        work.bytes = y.template GetTensorMutableData<uint8_t>();
      work.x = x.data;
      work.k = weight.k;
      work.n = weight.n;
      work.panels = weight.panels.get();
      work.start = of.start.data();
      work.scale = of.scale.data();
      work.bias = of.bias.data();
      work.inverse = of.inverse.data();
      work.zero = of.zero.data();
      work.floor = of.floor.empty() ? nullptr : of.floor.data();
      work.activation = activation_;
      run(context, work);
      return nullptr;
    });
  }

 private:
  inline static const Named kOp{kName[kind]};
  static constexpr auto kFixed = [] {
    if constexpr (to_float)
      return std::array{kXScale, kXZero, kWeight, kWeightScale, kBias};
    else
      return std::array{kXScale, kXZero, kWeight, kWeightScale, kBias, kYScale, kYZero};
  }();

  struct Weight {
    size_t k, n;
    Packed panels;
    std::vector<int32_t> sums;

    std::string text() const { return "[" + std::to_string(k) + ", " + std::to_string(n) + "]"; }
  };

  // Each as long as whole panels are; see LinearWork.
  struct Columns {
    std::vector<int32_t> start, zero;
    std::vector<float> scale, bias, inverse;
    std::vector<uint8_t> floor;

    // What is quantized as it comes is scaled once, where no number leaves the range that a conversion to int32 has.
    void quantize_at_once(size_t k, bool relu) {
      std::vector<float> scales, biases;
      for (size_t i = 0; i < scale.size(); ++i) {
        const double step = double{scale[i]} * inverse[i], middle = double{bias[i]} * inverse[i];
        if (!(255.0 * 128 * k * step + std::abs(middle) < 1 << 30)) return;
        scales.push_back(static_cast<float>(step));
        biases.push_back(static_cast<float>(middle));
      }
      scale = scales;
      bias = biases;
      for (const int32_t z : zero) floor.push_back(static_cast<uint8_t>(relu ? z : 0));
    }
  };

  static int32_t activation(Ort::ConstKernelInfo info) {
    if (kind == kPointwise) return kNone;
    const auto code = kOp.attribute<int64_t>(info, "activation");
    if (code < kNone || code > kQuickGelu)
      kOp.invalid("activation is " + std::to_string(code) +
                  "; expected 0 none, 1 relu, 2 gelu, 3 gelu_tanh or 4 quick_gelu");
    return static_cast<int32_t>(code);
  }

  static Weight pack(const Inputs& inputs) {
    const Input<int8_t> weight(kOp, inputs(kWeight), "weight");
    if (weight.shape.size() != 2) weight.refuse("[K, N]");
    const size_t k = weight.side(0), n = weight.side(1);
    if (k > kMostK) weight.refuse("at most " + std::to_string(kMostK) + " rows");
    Weight made{k, n, packed(linear_panels(n) * linear_panel_bytes(k)), {}};
    made.sums.resize(linear_panels(n) * kPanel);
    pack_linear(weight.data, k, n, made.panels.get(), made.sums.data());
    return made;
  }

  // Of each column, whether there are n or one for all.
  template <class T>
  static std::vector<T> each(const std::vector<T>& numbers, size_t n) {
    return numbers.size() == n ? numbers : std::vector<T>(n, numbers[0]);
  }

  static Columns columns(const Inputs& inputs, const Weight& weight, int32_t activation) {
    const size_t n = weight.n;
    const float x_scale = Input<float>(kOp, inputs(kXScale), "x_scale").scale();
    const uint32_t x_zero = Input<uint8_t>(kOp, inputs(kXZero), "x_zero").one();
    const Input<float> scale(kOp, inputs(kWeightScale), "weight_scale"), bias(kOp, inputs(kBias), "bias");
    const bool scales = scale.columns(n);
    scale.check_scales();
    if (bias.shape.size() != 1 || bias.side(0) != n) bias.refuse("[" + std::to_string(n) + "]");
    Columns made{weight.sums, {}, {}, {bias.data, bias.data + n}, {}, {}};
    for (int32_t& sum : made.start) sum = static_cast<int32_t>(-x_zero * static_cast<uint32_t>(sum));
    for (size_t i = 0; i < n; ++i) made.scale.push_back(scale.data[scales ? i : 0] * x_scale);
    if constexpr (!to_float) {
      const Steps steps({kOp, inputs(kYScale), "y_scale"}, {kOp, inputs(kYZero), "y_zero"}, n);
      made.inverse = each(steps.inverse, n);
      made.zero = each(steps.zero, n);
      if (activation <= kRelu) made.quantize_at_once(weight.k, activation == kRelu);
    }
    for (auto* numbers : {&made.scale, &made.bias, &made.inverse}) numbers->resize(weight.sums.size());
    made.zero.resize(weight.sums.size());
    if (!made.floor.empty()) made.floor.resize(weight.sums.size());
    return made;
  }

  // Panels of columns, all of them for as many rows as are near; then the next rows.
  static void run(Ort::KernelContext& context, const LinearWork& work) {
    const size_t panels = linear_panels(work.n), parts = (work.rows * work.k + kNear - 1) / kNear;
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
        if (part.bytes) part.bytes += row * work.n;
        kernels().quant_linear(part, panel, end);
        first += end - panel;
      }
    });
  }

  int32_t activation_;
  std::optional<Weight> weight_;
  std::optional<Columns> columns_;
};

template <Kind kind>
struct Schema : Op<Schema<kind>, Linear<kind>> {
  static constexpr bool to_float = kind == kToFloat;
  static constexpr ONNXTensorElementDataType kOut =
      to_float ? ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT : ONNX_TENSOR_ELEMENT_DATA_TYPE_UINT8;

  Schema() {
    OrtCustomOp::InferOutputShapeFn = [](const OrtCustomOp*, OrtShapeInferContext* context) {
      return guarded([&] { return infer(context); });
    };
    if constexpr (to_float) {
      // a residual is read where y is then written, tile by tile
      OrtCustomOp::GetMayInplace = [](int** inputs, int** outputs) -> size_t {
        static int residual = kResidual, y = 0;
        *inputs = &residual;
        *outputs = &y;
        return 1;
      };
      OrtCustomOp::ReleaseMayInplace = [](int*, int*) {};
    }
  }

  // The shape of x, its last dimension that of the weight; nothing where either's rank is not known.
  static OrtStatusPtr infer(OrtShapeInferContext* context) {
    Known y = Known::input(context, kX);
    const Known weight = Known::input(context, kWeight);
    if (y.dims.empty() || weight.dims.size() != 2) return nullptr;
    y.dims.back() = weight.dims[1];
    y.names.back() = weight.names[1];
    return y.output(context, 0, kOut);
  }

  const char* GetName() const { return kName[kind]; }
  size_t GetInputTypeCount() const { return to_float ? 7 : 8; }
  ONNXTensorElementDataType GetInputType(size_t input) const {
    if (input == kX || input == kXZero) return ONNX_TENSOR_ELEMENT_DATA_TYPE_UINT8;
    if (input == kWeight) return ONNX_TENSOR_ELEMENT_DATA_TYPE_INT8;
    return input == kYZero ? ONNX_TENSOR_ELEMENT_DATA_TYPE_UINT8 : ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT;
  }
  size_t GetOutputTypeCount() const { return 1; }
  ONNXTensorElementDataType GetOutputType(size_t) const { return kOut; }
};

}  // namespace

const OrtCustomOp* quant_linear_op() {
  static const Schema<kToBytes> op;
  return &op;
}

const OrtCustomOp* quant_pointwise_op() {
  static const Schema<kPointwise> op;
  return &op;
}

const OrtCustomOp* quant_linear_to_float_op() {
  static const Schema<kToFloat> op;
  return &op;
}

}  // namespace calmclip
