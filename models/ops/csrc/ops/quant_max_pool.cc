// The greatest byte of each window, channels last.
#include "../kernels/quant_max_pool.h"

#include "../kernels/dispatch.h"
#include "quantized.h"

namespace calmclip {
namespace {

constexpr size_t kGrain = 256 << 10;  // bytes of x that are worth a thread: about 10 us

const Named kOp("QuantMaxPool");

class MaxPool {
 public:
  explicit MaxPool(Ort::ConstKernelInfo info)
      : window_(kOp.sizes<2>(info, "window", 1)),
        strides_(kOp.sizes<2>(info, "strides", 1)),
        pads_(kOp.sizes<4>(info, "pads", 0)) {}

  OrtStatusPtr ComputeV2(OrtKernelContext* raw) {
    return guarded([&]() -> OrtStatusPtr {
      Ort::KernelContext context(raw);
      const Input<uint8_t> x(kOp, context, 0, "x");
      if (x.shape.size() != 4) x.refuse("[batch, height, width, channels]");
      const int64_t down = windows(x.shape[1], pads_[0], pads_[2], window_[0], strides_[0]);
      const int64_t across = windows(x.shape[2], pads_[1], pads_[3], window_[1], strides_[1]);
      auto y = context.GetOutput(0, {x.shape[0], down, across, x.shape[3]});
      if (x.side(0) == 0 || down == 0 || across == 0 || x.side(3) == 0) return nullptr;
      const auto size = [](int64_t side) { return static_cast<size_t>(side); };
      const MaxPoolWork work{x.data,          y.GetTensorMutableData<uint8_t>(),
                             x.side(1),       x.side(2),
                             x.side(3),       size(down),
                             size(across),    size(pads_[0]),
                             size(pads_[1]),  size(window_[0]),
                             size(window_[1]), size(strides_[0]),
                             size(strides_[1])};
      const size_t line = work.width * work.channels;
      const size_t grain = kGrain / std::max<size_t>(1, line * std::min(work.high, work.height));
      spread(context, x.side(0) * work.out_height, grain, [&](size_t first, size_t last) {
        std::vector<uint8_t> room(line);
        kernels().quant_max_pool(work, first, last, room.data());
      });
      return nullptr;
    });
  }

 private:
  std::array<int64_t, 2> window_, strides_;
  std::array<int64_t, 4> pads_;
};

struct Schema : Op<Schema, MaxPool> {
  static constexpr const char* kOpName = "QuantMaxPool";
  static constexpr Type kInputTypes[] = {kUint8};
  static constexpr Type kOutputTypes[] = {kUint8};

  // [B, H', W', C], as far as known
  static OrtStatusPtr infer(OrtShapeInferContext* context) {
    Known y = Known::input(context, 0);
    const auto window = known_attribute<2>(context, "window", ORT_OP_ATTR_INTS);
    const auto strides = known_attribute<2>(context, "strides", ORT_OP_ATTR_INTS);
    const auto pads = known_attribute<4>(context, "pads", ORT_OP_ATTR_INTS);
    if (y.dims.size() != 4 || window.empty() || strides.empty() || pads.empty() || strides[0] < 1 || strides[1] < 1)
      return nullptr;
    for (size_t i = 0; i < 2; ++i)
      y.set(1 + i, y.dims[1 + i] < 0 ? -1 : windows(y.dims[1 + i], pads[i], pads[2 + i], window[i], strides[i]));
    return y.output(context, 0, kUint8);
  }
};

}  // namespace

DEFINE_OP(quant_max_pool, Schema)

}  // namespace calmclip
