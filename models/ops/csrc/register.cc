// The entry point that ONNX Runtime calls when the library is registered with a session.
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
#define OP(key) domain.Add(calmclip::key##_op());
#include "ops/ops.inc"
#undef OP
      return true;
    }();
    (void)filled;
    Ort::ThrowOnError(api->AddCustomOpDomain(options, domain));
    return nullptr;
  });
}

// The version of the operators' contract, `calmclip.models.ops.spec.VERSION`.
extern "C" __attribute__((visibility("default"))) int calmclip_ops_version() { return 1; }
