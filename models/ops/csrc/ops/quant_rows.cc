// Rows in steps of their own, as uint8 around 128, after an RMS norm or without. Source: Zhang and Sennrich 2019 (arXiv
// 1910.07467), equation 4, for the norm.
#include "../kernels/dispatch.h"
#include "quantized.h"

namespace calmclip {
namespace {

constexpr size_t kGrain = 32768;  // numbers that are worth a thread: about 6 us

enum Place { kX, kWeight };

const Named kOp("QuantRows");

class Rows {
 public:
  explicit Rows(Ort::ConstKernelInfo info)
      : normalize_(kOp.attribute<int64_t>(info, "normalize")), epsilon_(kOp.attribute<float>(info, "epsilon")) {
    if (normalize_ != 0 && normalize_ != 1)
      kOp.invalid("normalize is " + std::to_string(normalize_) + "; expected 0 or 1");
    if (!(epsilon_ >= 0) || !std::isfinite(epsilon_))
      kOp.invalid("epsilon is " + std::to_string(epsilon_) + "; expected a number of at least 0");
  }

  OrtStatusPtr ComputeV2(OrtKernelContext* raw) {
    return guarded([&]() -> OrtStatusPtr {
      Ort::KernelContext context(raw);
      const Input<float> x(kOp, context, kX, "x"), weight(kOp, context, kWeight, "weight");
      if (x.shape.empty() || x.shape.back() < 1) x.refuse("[..., columns], at least one column");
      const size_t width = x.side(x.shape.size() - 1);
      const bool weighted = weight.shape.size() == 1 && weight.side(0) == width;
      if (!weighted && !(weight.shape.size() <= 1 && weight.count == 1 && *weight.data == 1))
        weight.refuse("[" + std::to_string(width) + "], or one number, 1");
      auto shape = x.shape;
      auto bytes = context.GetOutput(0, shape);
      shape.back() = 1;
      auto steps = context.GetOutput(1, shape);
      ScaledRows rows{};
      rows.width = width, rows.epsilon = epsilon_, rows.normalize = normalize_ == 1;
      rows.weight = weighted ? weight.data : nullptr;
      uint8_t* const y = bytes.GetTensorMutableData<uint8_t>();
      float* const scale = steps.GetTensorMutableData<float>();
      spread(context, x.count / width, kGrain / width, [&](size_t first, size_t last) {
        ScaledRows mine = rows;
        mine.x = x.data + first * width;
        mine.y = y + first * width;
        mine.scale = scale + first;
        mine.rows = last - first;
        kernels().quant_rows(mine);
      });
      return nullptr;
    });
  }

 private:
  int64_t normalize_;
  float epsilon_;
};

struct Schema : Op<Schema, Rows> {
  static constexpr const char* kOpName = "QuantRows";
  static constexpr Type kInputTypes[] = {kFloat, kFloat}, kOutputTypes[] = {kUint8, kFloat};

  static OrtStatusPtr infer(OrtShapeInferContext* context) {
    Known x = Known::input(context, kX);
    if (x.dims.empty()) return nullptr;
    OrtStatusPtr status = x.output(context, 0, kUint8);
    x.set(x.dims.size() - 1, 1);
    return status ? status : x.output(context, 1, kFloat);
  }
};

}  // namespace

DEFINE_OP(quant_rows, Schema)

}  // namespace calmclip
