// Any function of one variable from uint8 to uint8: a table of its 256 results.
#include "../kernels/dispatch.h"
#include "quantized.h"

namespace calmclip {
namespace {

constexpr size_t kGrain = 262144;  // bytes that are worth a thread: about 6 us

enum Place { kX, kTable };

const Named kOp("QuantLookup");

class Lookup {
 public:
  explicit Lookup(Ort::ConstKernelInfo) {}

  OrtStatusPtr ComputeV2(OrtKernelContext* raw) {
    return guarded([&]() -> OrtStatusPtr {
      Ort::KernelContext context(raw);
      const Input<uint8_t> x(kOp, context, kX, "x"), table(kOp, context, kTable, "table");
      if (table.shape != std::vector<int64_t>{256}) table.refuse("[256]");
      auto output = context.GetOutput(0, x.shape);
      uint8_t* const y = output.GetTensorMutableData<uint8_t>();
      spread(context, x.count, kGrain, [&](size_t first, size_t last) {
        kernels().quant_lookup(x.data + first, y + first, last - first, table.data);
      });
      return nullptr;
    });
  }
};

struct Schema : Op<Schema, Lookup> {
  static constexpr const char* kOpName = "QuantLookup";
  static constexpr Type kInputTypes[] = {kUint8, kUint8}, kOutputTypes[] = {kUint8};
  static inline int in_place[] = {kX};
  static OrtStatusPtr infer(OrtShapeInferContext* context) { return same_shape(context, kX, kUint8); }
};

}  // namespace

DEFINE_OP(quant_lookup, Schema)

}  // namespace calmclip
