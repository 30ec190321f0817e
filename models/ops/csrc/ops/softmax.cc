// Softmax over one axis, plain or clipped. Source: Bondarenko et al. 2023 (arXiv 2306.12929), equation 4.
#include "../kernels/dispatch.h"
#include "op.h"

namespace calmclip {
namespace {

class Softmax {
 public:
  explicit Softmax(Ort::ConstKernelInfo info)
      : axis_(info.GetAttribute<int64_t>("axis")),
        gamma_(info.GetAttribute<float>("gamma")),
        zeta_(info.GetAttribute<float>("zeta")) {
    if (!(gamma_ <= 0 && zeta_ >= 1))
      throw Ort::Exception("Softmax: gamma is " + std::to_string(gamma_) + " and zeta " + std::to_string(zeta_) +
                               "; expected gamma <= 0 and zeta >= 1",
                           ORT_INVALID_ARGUMENT);
  }

  OrtStatusPtr ComputeV2(OrtKernelContext* raw) {
    return guarded([&]() -> OrtStatusPtr {
      Ort::KernelContext context(raw);
      const auto input = context.GetInput(0);
      const auto shape = input.GetTensorTypeAndShapeInfo().GetShape();
      const auto rank = static_cast<int64_t>(shape.size());
      if (axis_ < -rank || axis_ >= rank || (axis_ + rank) % rank != rank - 1)
        return refuse("Softmax: axis is " + std::to_string(axis_) + " and x has the shape " + text(shape));
      auto output = context.GetOutput(0, shape);
      const auto cols = static_cast<size_t>(shape.back());
      size_t rows = 1;
      for (size_t i = 0; i + 1 < shape.size(); ++i) rows *= static_cast<size_t>(shape[i]);
      const float* x = input.GetTensorData<float>();
      float* y = output.GetTensorMutableData<float>();
      spread(context, rows, 16384 / std::max<size_t>(cols, 1), [&](size_t first, size_t last) {
        kernels().softmax_reload(x + first * cols, y + first * cols, last - first, cols, gamma_, zeta_, false);
      });
      return nullptr;
    });
  }

 private:
  int64_t axis_;
  float gamma_, zeta_;
};

struct Schema : Op<Schema, Softmax> {
  const char* GetName() const { return "Softmax"; }
  size_t GetInputTypeCount() const { return 1; }
  ONNXTensorElementDataType GetInputType(size_t) const { return ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT; }
  size_t GetOutputTypeCount() const { return 1; }
  ONNXTensorElementDataType GetOutputType(size_t) const { return ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT; }
};

}  // namespace

const OrtCustomOp* softmax_op() {
  static const Schema op;
  return &op;
}

}  // namespace calmclip
