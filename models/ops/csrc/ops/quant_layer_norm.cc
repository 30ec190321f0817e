// A sum and its layer norm, as float32 and quantized, row by row.
#include <atomic>
#include <functional>
#include <memory>
#include <new>
#include <optional>

#include "../kernels/dispatch.h"
#include "quantized.h"

namespace calmclip {
namespace {

constexpr size_t kGrain = 32768;  // numbers that are worth a thread: about 6 us

enum Place { kX, kResidual, kWeight, kBias, kYScale, kYZero };

const Named kOp("QuantLayerNorm");

// The inputs by index: of a run, or the constants of the graph.
using Inputs = std::function<Ort::ConstValue(Place)>;

// The numbers of each column. Constants of the graph are read once, because in a run each input costs several calls of
// ONNX Runtime.
struct Columns {
  Columns(const Inputs& inputs, size_t width)
      : weight(row(inputs(kWeight), "weight", width)),
        bias(row(inputs(kBias), "bias", width)),
        steps({kOp, inputs(kYScale), "y_scale"}, {kOp, inputs(kYZero), "y_zero"}, width) {}

  std::vector<float> weight, bias;
  Steps steps;

 private:
  static std::vector<float> row(Ort::ConstValue value, const char* name, size_t width) {
    const Input<float> input(kOp, value, name);
    if (input.shape.size() != 1 || input.side(0) != width) input.refuse("[" + std::to_string(width) + "]");
    return {input.data, input.data + width};
  }
};

class LayerNorm {
 public:
  explicit LayerNorm(Ort::ConstKernelInfo info) : epsilon_(kOp.attribute<float>(info, "epsilon")) {
    if (!(epsilon_ >= 0) || !std::isfinite(epsilon_))
      kOp.invalid("epsilon is " + std::to_string(epsilon_) + "; expected a number of at least 0");
    const Inputs inputs = [&](Place place) { return constant(info, place); };
    if (!inputs(kWeight) || !inputs(kBias) || !inputs(kYScale) || !inputs(kYZero)) return;
    const size_t width = Input<float>(kOp, inputs(kWeight), "weight").count;
    // if they do not fit each other, a run knows from x which input is wrong
    if (Input<float>(kOp, inputs(kBias), "bias").count == width) columns_.emplace(inputs, width);
  }

  OrtStatusPtr ComputeV2(OrtKernelContext* raw) {
    return guarded([&]() -> OrtStatusPtr {
      Ort::KernelContext context(raw);
      const Input<float> x(kOp, context, kX, "x"), residual(kOp, context, kResidual, "residual");
      if (x.shape.empty() || x.shape.back() < 1) x.refuse("[..., columns], at least one column");
      const size_t width = x.side(x.shape.size() - 1);
      std::optional<Columns> fed;
      if (!columns_) fed.emplace([&](Place place) { return context.GetInput(place); }, width);
      const Columns& of = columns_ ? *columns_ : *fed;
      const bool one_added = residual.shape != x.shape;
      if (one_added && !(residual.shape.size() <= 1 && residual.count == 1))
        residual.refuse("that of x, " + text(x.shape) + ", or [1]");
      if (of.weight.size() != width)
        kOp.invalid("weight has the shape [" + std::to_string(of.weight.size()) + "]; expected [" +
                    std::to_string(width) + "], the last side of x");

      NormRows rows{};
      rows.width = width, rows.epsilon = epsilon_, rows.columns = of.steps.inverse.size() > 1;
      rows.weight = of.weight.data(), rows.bias = of.bias.data();
      rows.added = one_added ? *residual.data : 0;
      rows.inverse = of.steps.inverse.data(), rows.zero = of.steps.zero.data();

      auto output = context.GetOutput(0, x.shape);
      uint8_t* const y = output.GetTensorMutableData<uint8_t>();
      float *const normed = answer(context, 1, x.shape), *const sum = answer(context, 2, x.shape);
      std::atomic<bool> room = true;
      spread(context, x.count / width, kGrain / width, [&](size_t first, size_t last) {
        const std::unique_ptr<float[]> row(new (std::nothrow) float[width]);
        if (!row) {
          room = false;
          return;
        }
        const size_t at = first * width;
        NormRows mine = rows;
        mine.x = x.data + at;
        mine.residual = one_added ? nullptr : residual.data + at;
        mine.y = y + at;
        mine.normed = normed ? normed + at : nullptr;
        mine.sum = sum ? sum + at : nullptr;
        mine.rows = last - first;
        kernels().quant_layer_norm(mine, row.get());
      });
      if (!room) return Ort::GetApi().CreateStatus(ORT_FAIL, "QuantLayerNorm: out of memory");
      return nullptr;
    });
  }

 private:
  // Null if the node does not use this output.
  static float* answer(Ort::KernelContext& context, size_t index, const std::vector<int64_t>& shape) {
    if (index >= context.GetOutputCount()) return nullptr;
    auto output = context.GetOutput(index, shape);
    return output ? output.GetTensorMutableData<float>() : nullptr;
  }

  float epsilon_;
  std::optional<Columns> columns_;  // if all are constants
};

struct Schema : Op<Schema, LayerNorm> {
  static constexpr const char* kOpName = "QuantLayerNorm";
  static constexpr Type kInputTypes[] = {kFloat, kFloat, kFloat, kFloat, kFloat, kUint8};
  static constexpr Type kOutputTypes[] = {kUint8, kFloat, kFloat};

  static OrtStatusPtr infer(OrtShapeInferContext* context) {
    const Known x = Known::input(context, kX);
    if (x.dims.empty()) return nullptr;
    OrtStatusPtr status = x.output(context, 0, kUint8);
    for (size_t i = 1; !status && i < 3; ++i)  // ignores the error for outputs that the node does not name
      went(x.output(context, i, kFloat));
    return status;
  }
  OrtCustomOpInputOutputCharacteristic GetOutputCharacteristic(size_t index) const {
    return index == 0 ? INPUT_OUTPUT_REQUIRED : INPUT_OUTPUT_OPTIONAL;
  }
};

}  // namespace

DEFINE_OP(quant_layer_norm, Schema)

}  // namespace calmclip
