// Pixels in bytes, cut into patches: what a convolution whose windows do not overlap multiplies its weights with.
#include "../kernels/dispatch.h"
#include "quantized.h"

namespace calmclip {
namespace {

constexpr size_t kGrain = 65536;  // pixels that are worth a thread: some 6 us

enum Place { kX, kYScale, kYZero };

const Named kOp("QuantPatches");

class Patches {
 public:
  explicit Patches(Ort::ConstKernelInfo info) {
    std::vector<int64_t> patch;
    try {
      patch = info.GetAttributes<int64_t>("patch");
    } catch (const Ort::Exception& error) {
      kOp.invalid(std::string("the attribute patch cannot be read: ") + error.what());
    }
    if (patch.size() != 2 || std::min(patch[0], patch[1]) < 1 || std::max(patch[0], patch[1]) > INT32_MAX)
      kOp.invalid("patch is " + text(patch) + "; expected a height and a width");
    height_ = static_cast<size_t>(patch[0]);
    width_ = static_cast<size_t>(patch[1]);
  }

  OrtStatusPtr ComputeV2(OrtKernelContext* raw) {
    return guarded([&]() -> OrtStatusPtr {
      Ort::KernelContext context(raw);
      const Input<float> x(kOp, context, kX, "x"), y_scale(kOp, context, kYScale, "y_scale");
      const Input<uint8_t> y_zero(kOp, context, kYZero, "y_zero");
      if (x.shape.size() != 4) x.refuse("[batch, channels, height, width]");
      const size_t batch = x.side(0), channels = x.side(1), height = x.side(2), width = x.side(3);
      if (height % height_ || width % width_)
        x.refuse("multiples of the patch, " + std::to_string(height_) + " by " + std::to_string(width_));
      const float inverse = 1 / y_scale.scale();
      const int32_t zero = y_zero.one();
      const size_t down = height / height_, across = width / width_, numbers = channels * height_ * width_;
      const auto patches = static_cast<int64_t>(down * across);
      auto output = context.GetOutput(0, {x.shape[0], patches, static_cast<int64_t>(numbers)});
      if (x.count == 0) return nullptr;
      uint8_t* const y = output.GetTensorMutableData<uint8_t>();
      // a unit is a row of patches
      spread(context, batch * down, kGrain / (across * numbers), [&](size_t first, size_t last) {
        for (size_t unit = first; unit < last; ++unit)
          for (size_t c = 0; c < channels; ++c)
            for (size_t i = 0; i < height_; ++i) {
              const size_t row = (unit / down * channels + c) * height + unit % down * height_ + i;
              kernels().quant_patches(x.data + row * width, width_, across,
                                      y + unit * across * numbers + (c * height_ + i) * width_, numbers, inverse, zero);
            }
      });
      return nullptr;
    });
  }

 private:
  size_t height_, width_;
};

struct Schema : Op<Schema, Patches> {
  Schema() {
    // [B, P, K], as far as it is known
    InferOutputShapeFn = [](const OrtCustomOp*, OrtShapeInferContext* context) {
      return guarded([&]() -> OrtStatusPtr {
        const Known x = Known::input(context, kX);
        const auto patch = known_attribute<2>(context, "patch", ORT_OP_ATTR_INTS);
        if (x.dims.size() != 4 || patch.empty() || patch[0] < 1 || patch[1] < 1) return nullptr;
        Known y{{x.dims[0], -1, -1}, {x.names[0], "", ""}};
        if (x.dims[2] >= 0 && x.dims[3] >= 0) y.dims[1] = x.dims[2] / patch[0] * (x.dims[3] / patch[1]);
        if (x.dims[1] >= 0) y.dims[2] = x.dims[1] * patch[0] * patch[1];
        return y.output(context, 0, ONNX_TENSOR_ELEMENT_DATA_TYPE_UINT8);
      });
    };
  }
  const char* GetName() const { return "QuantPatches"; }
  size_t GetInputTypeCount() const { return 3; }
  ONNXTensorElementDataType GetInputType(size_t index) const {
    return index == kYZero ? ONNX_TENSOR_ELEMENT_DATA_TYPE_UINT8 : ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT;
  }
  size_t GetOutputTypeCount() const { return 1; }
  ONNXTensorElementDataType GetOutputType(size_t) const { return ONNX_TENSOR_ELEMENT_DATA_TYPE_UINT8; }
};

}  // namespace

const OrtCustomOp* quant_patches_op() {
  static const Schema op;
  return &op;
}

}  // namespace calmclip
