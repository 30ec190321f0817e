// A linear layer on bytes, its activation, and either bytes again or float32 with a residual added.
// Source: Jacob et al. 2017 (arXiv 1712.05877), section 2.2.
//
// Two operators, for an output's type follows from the inputs' types: QuantLinear and QuantLinearToFloat.
// What a graph holds as constants is made ready once, when its node's kernel is made; what is fed, in every run.
#include "../kernels/quant_linear.h"

#include <array>
#include <cmath>
#include <cstring>
#include <functional>
#include <optional>

#include "../kernels/activation_curve.h"
#include "../kernels/dispatch.h"
#include "op.h"
#include "packed.h"

namespace calmclip {
namespace {

constexpr size_t kGrain = 2 << 20;   // products that are worth a thread
constexpr size_t kFewRows = 8;       // fewer take as long: it is the weights that take their time
constexpr size_t kNear = 256 << 10;  // bytes of x at a time, for they are read once a panel: a part of an L2 cache

constexpr const char* kName[2] = {"QuantLinear", "QuantLinearToFloat"};
enum Input : size_t { kX, kXScale, kXZero, kWeight, kWeightScale, kBias, kYScale, kYZero, kResidual = kYScale };

// The inputs by their places: of a run, or the constants among them.
using Inputs = std::function<Ort::ConstValue(Input)>;

template <bool to_float>
class Linear {
 public:
  explicit Linear(Ort::ConstKernelInfo info) : activation_(activation(info)) {
    bool constant = true;
    const Inputs inputs = [&](Input input) {
      int is_constant = 0;
      return info.GetTensorConstantInput(input, &is_constant);
    };
    for (const Input input : kFixed) constant &= static_cast<bool>(inputs(input));
    if (inputs(kWeight)) weight_.emplace(pack(inputs));
    if (constant) columns_.emplace(columns(inputs, *weight_));
  }

  OrtStatusPtr ComputeV2(OrtKernelContext* raw) {
    return guarded([&]() -> OrtStatusPtr {
      Ort::KernelContext context(raw);
      const Inputs inputs = [&](Input input) { return context.GetInput(input); };
      std::optional<Weight> fed_weight;
      if (!weight_) fed_weight.emplace(pack(inputs));
      const Weight& weight = weight_ ? *weight_ : *fed_weight;
      std::optional<Columns> fed_columns;
      if (!columns_) fed_columns.emplace(columns(inputs, weight));
      const Columns& of = columns_ ? *columns_ : *fed_columns;

      const auto x = context.GetInput(kX);
      auto shape = x.GetTensorTypeAndShapeInfo().GetShape();
      if (shape.empty() || shape.back() != static_cast<int64_t>(weight.k))
        refuse_("x has the shape " + text(shape) + "; expected [..., " + std::to_string(weight.k) +
                "], for the weight is " + weight.text());
      shape.back() = static_cast<int64_t>(weight.n);
      LinearWork work{};
      work.rows = 1;
      for (size_t i = 0; i + 1 < shape.size(); ++i) work.rows *= static_cast<size_t>(shape[i]);
      if constexpr (to_float) {
        const auto residual = context.GetInput(kResidual);
        const auto found = residual.GetTensorTypeAndShapeInfo().GetShape();
        work.one_residual = found.empty() || found == std::vector<int64_t>{1};
        if (!work.one_residual && found != shape)
          refuse_("residual has the shape " + text(found) + "; expected that of y, " + text(shape) + ", or one number");
        work.residual = residual.GetTensorData<float>();
      }
      auto y = context.GetOutput(0, shape);
      if (work.rows == 0 || weight.n == 0) return nullptr;
      if constexpr (to_float)
        work.values = y.template GetTensorMutableData<float>();
      else
        work.bytes = y.template GetTensorMutableData<uint8_t>();
      work.x = x.GetTensorData<uint8_t>();
      work.k = weight.k;
      work.n = weight.n;
      work.panels = weight.panels.get();
      work.start = of.start.data();
      work.scale = of.scale.data();
      work.bias = of.bias.data();
      work.inverse = of.inverse.data();
      work.zero = of.zero.data();
      work.activation = activation_;
      run(context, work);
      return nullptr;
    });
  }

 private:
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
  };

  [[noreturn]] static void refuse_(const std::string& what) {
    throw Ort::Exception(kName[to_float] + (": " + what), ORT_INVALID_ARGUMENT);
  }

  static int32_t activation(Ort::ConstKernelInfo info) {
    int64_t code = 0;
    try {
      code = info.GetAttribute<int64_t>("activation");
    } catch (const Ort::Exception& error) {
      refuse_(std::string("the attribute activation cannot be read: ") + error.what());
    }
    if (code < kNone || code > kQuickGelu)
      refuse_("activation is " + std::to_string(code) +
              "; expected 0 none, 1 relu, 2 gelu, 3 gelu_tanh or 4 quick_gelu");
    return static_cast<int32_t>(code);
  }

  static Weight pack(const Inputs& inputs) {
    const auto weight = inputs(kWeight);
    const auto shape = weight.GetTensorTypeAndShapeInfo().GetShape();
    if (shape.size() != 2) refuse_("weight has the shape " + text(shape) + "; expected [K, N]");
    const auto k = static_cast<size_t>(shape[0]), n = static_cast<size_t>(shape[1]);
    if (k > kMostK) refuse_("weight has the shape " + text(shape) + "; expected at most 65536 rows");
    Weight made{k, n, packed(linear_panels(n) * linear_panel_bytes(k)), {}};
    made.sums.resize(linear_panels(n) * kPanel);
    pack_linear(weight.GetTensorData<int8_t>(), k, n, made.panels.get(), made.sums.data());
    return made;
  }

  // `name` for each of n columns; `one`: a single number stands for all of them.
  template <class T>
  static std::vector<T> each(const Inputs& inputs, Input input, const char* name, size_t n, bool one) {
    const auto value = inputs(input);
    const auto shape = value.GetTensorTypeAndShapeInfo().GetShape();
    const T* data = value.template GetTensorData<T>();
    if (one && (shape.empty() || shape == std::vector<int64_t>{1})) return std::vector<T>(n, *data);
    if (shape == std::vector<int64_t>{static_cast<int64_t>(n)}) return {data, data + n};
    const auto wanted = "[" + std::to_string(n) + "]";
    refuse_(std::string(name) + " has the shape " + text(shape) + "; expected " +
            (!one ? wanted : n == 1 ? "one number" : wanted + " or one number"));
  }

  static std::vector<float> scales(const Inputs& inputs, Input input, const char* name, size_t n) {
    auto found = each<float>(inputs, input, name, n, true);
    for (const float scale : found)
      if (!(scale > 0) || !std::isnormal(scale))
        refuse_(std::string(name) + " holds " + std::to_string(scale) + "; expected positive, normal numbers");
    return found;
  }

  static Columns columns(const Inputs& inputs, const Weight& weight) {
    const size_t n = weight.n;
    const float x_scale = scales(inputs, kXScale, "x_scale", 1)[0];
    const uint32_t x_zero = each<uint8_t>(inputs, kXZero, "x_zero", 1, true)[0];
    Columns made{weight.sums, {}, scales(inputs, kWeightScale, "weight_scale", n),
                 each<float>(inputs, kBias, "bias", n, false), {}};
    for (int32_t& sum : made.start) sum = static_cast<int32_t>(-x_zero * static_cast<uint32_t>(sum));
    for (float& scale : made.scale) scale *= x_scale;
    if constexpr (!to_float) {
      made.inverse = scales(inputs, kYScale, "y_scale", n);
      for (float& scale : made.inverse) scale = 1 / scale;
      const auto zero = each<uint8_t>(inputs, kYZero, "y_zero", n, true);
      made.zero.assign(zero.begin(), zero.end());
    }
    for (auto* numbers : {&made.scale, &made.bias, &made.inverse}) numbers->resize(weight.sums.size());
    made.zero.resize(weight.sums.size());
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

template <bool to_float>
struct Schema : Op<Schema<to_float>, Linear<to_float>> {
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

  // The shape of x, its last dimension that of the weight; nothing where either's rank is not known. A dimension is a
  // number, or -1 and a name.
  static OrtStatusPtr infer(OrtShapeInferContext* context) {
    const OrtApi& api = Ort::GetApi();
    std::vector<int64_t> sides[2];
    std::vector<const char*> names[2];
    for (const Input input : {kX, kWeight}) {
      OrtTensorTypeAndShapeInfo* info = nullptr;  // the context's own
      Ort::ThrowOnError(api.ShapeInferContext_GetInputTypeShape(context, input, &info));
      size_t rank = 0;
      Ort::ThrowOnError(api.GetDimensionsCount(info, &rank));
      sides[input == kWeight].resize(rank);
      names[input == kWeight].resize(rank);
      Ort::ThrowOnError(api.GetDimensions(info, sides[input == kWeight].data(), rank));
      Ort::ThrowOnError(api.GetSymbolicDimensions(info, names[input == kWeight].data(), rank));
    }
    if (sides[0].empty() || sides[1].size() != 2) return nullptr;
    sides[0].back() = sides[1][1];
    names[0].back() = names[1][1];
    OrtTensorTypeAndShapeInfo* info = nullptr;
    Ort::ThrowOnError(api.CreateTensorTypeAndShapeInfo(&info));
    OrtStatusPtr status = api.SetTensorElementType(info, kOut);
    if (!status) status = api.SetDimensions(info, sides[0].data(), sides[0].size());
    if (!status) status = api.SetSymbolicDimensions(info, names[0].data(), names[0].size());
    if (!status) status = api.ShapeInferContext_SetOutputTypeShape(context, 0, info);
    api.ReleaseTensorTypeAndShapeInfo(info);
    return status;
  }

  const char* GetName() const { return kName[to_float]; }
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
  static const Schema<false> op;
  return &op;
}

const OrtCustomOp* quant_linear_to_float_op() {
  static const Schema<true> op;
  return &op;
}

}  // namespace calmclip
