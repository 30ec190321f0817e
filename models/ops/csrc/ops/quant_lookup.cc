// Any function of one variable between bytes: its 256 answers in a table.
#include "../kernels/dispatch.h"
#include "quantized.h"

namespace calmclip {
namespace {

constexpr size_t kGrain = 262144;  // bytes that are worth a thread: some 6 us

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
  Schema() {
    // y has the shape of x, and may take its place.
    InferOutputShapeFn = [](const OrtCustomOp*, OrtShapeInferContext* context) {
      return guarded([&]() -> OrtStatusPtr {
        const Known x = Known::input(context, kX);
        return x.dims.empty() ? nullptr : x.output(context, 0, ONNX_TENSOR_ELEMENT_DATA_TYPE_UINT8);
      });
    };
    GetMayInplace = [](int** inputs, int** outputs) -> size_t {
      static int first = 0;
      *inputs = *outputs = &first;
      return 1;
    };
    ReleaseMayInplace = [](int*, int*) {};
  }
  const char* GetName() const { return "QuantLookup"; }
  size_t GetInputTypeCount() const { return 2; }
  ONNXTensorElementDataType GetInputType(size_t) const { return ONNX_TENSOR_ELEMENT_DATA_TYPE_UINT8; }
  size_t GetOutputTypeCount() const { return 1; }
  ONNXTensorElementDataType GetOutputType(size_t) const { return ONNX_TENSOR_ELEMENT_DATA_TYPE_UINT8; }
};

}  // namespace

const OrtCustomOp* quant_lookup_op() {
  static const Schema op;
  return &op;
}

}  // namespace calmclip
