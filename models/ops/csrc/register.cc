// What ONNX Runtime calls when the library is registered with a session.
#include "ops/op.h"

extern "C" __attribute__((visibility("default"))) OrtStatus* RegisterCustomOps(OrtSessionOptions* options,
                                                                               const OrtApiBase* base) {
  const OrtApi* api = base->GetApi(ORT_API_VERSION);
  if (!api) return base->GetApi(1)->CreateStatus(ORT_FAIL, "this ONNX Runtime is older than calmclip's op library");
  static const bool known = (Ort::InitApi(api), true);  // written once: sessions on other threads read it as they run
  (void)known;
  return calmclip::guarded([&]() -> OrtStatusPtr {
    static Ort::CustomOpDomain domain(calmclip::kDomain);  // lives as long as the library: sessions keep pointers
    static const bool filled = [] {
      for (const OrtCustomOp* op : {calmclip::softmax_op(), calmclip::soft_nms_op(), calmclip::image_to_pixels_op(),
                                    calmclip::image_to_quantized_pixels_op(), calmclip::quant_linear_op(),
                                    calmclip::quant_linear_to_float_op(), calmclip::quant_pointwise_op(),
                                    calmclip::quant_attention_op(),
                                    calmclip::quant_layer_norm_op(), calmclip::quant_patches_op(),
                                    calmclip::quant_depthwise_op(), calmclip::quant_lookup_op(),
                                    calmclip::quant_add_op()})
        domain.Add(op);
      return true;
    }();
    (void)filled;
    Ort::ThrowOnError(api->AddCustomOpDomain(options, domain));
    return nullptr;
  });
}

// The version of the operators' contract, `calmclip.models.ops.spec.VERSION`.
extern "C" __attribute__((visibility("default"))) int calmclip_ops_version() { return 1; }
