// The cuBLAS and cuBLASLt of the null GPU: products are counted, as launches too, and not computed.
#include "gpu.h"

typedef void *Handle;
static int make(Handle *handle) {
  static char something[1024];  // a caller may keep the object itself here, rather than a pointer to it
  return *handle = something, 0;
}

#define PRODUCT(name) \
  EXPORT int name() { return use(), count(PRODUCTS), count_launch(#name), 0; }
PRODUCT(cublasGemmEx)
PRODUCT(cublasGemmStridedBatchedEx)
PRODUCT(cublasSgemm_v2)
PRODUCT(cublasSgemmEx)
PRODUCT(cublasSgemmStridedBatched)
PRODUCT(cublasSgemv_v2)
PRODUCT(cublasSdot_v2)
PRODUCT(cublasDgemm_v2)
PRODUCT(cublasDgemmStridedBatched)
PRODUCT(cublasDgemv_v2)
PRODUCT(cublasDdot_v2)
PRODUCT(cublasDotEx)
PRODUCT(cublasLtMatmul)

EXPORT int cublasCreate_v2(Handle *handle) { return use(), make(handle); }
EXPORT int cublasGetMathMode(Handle, int *mode) { return *mode = 0; }
EXPORT int cublasGetPointerMode_v2(Handle, int *mode) { return *mode = 0; }
SUCCEEDS(cublasDestroy_v2)
SUCCEEDS(cublasSetStream_v2)
SUCCEEDS(cublasSetWorkspace_v2)
SUCCEEDS(cublasSetMathMode)
SUCCEEDS(cublasSetPointerMode_v2)
SUCCEEDS(cublasSetSmCountTarget)

EXPORT int cublasLtCreate(Handle *handle) { return make(handle); }
EXPORT int cublasLtMatmulDescCreate(Handle *description) { return make(description); }
EXPORT int cublasLtMatrixLayoutCreate(Handle *layout) { return make(layout); }
EXPORT int cublasLtMatmulPreferenceCreate(Handle *preference) { return make(preference); }
SUCCEEDS(cublasLtMatmulDescSetAttribute)
SUCCEEDS(cublasLtMatmulDescDestroy)
SUCCEEDS(cublasLtMatrixLayoutSetAttribute)
SUCCEEDS(cublasLtMatrixLayoutDestroy)
SUCCEEDS(cublasLtMatmulPreferenceSetAttribute)
SUCCEEDS(cublasLtMatmulPreferenceDestroy)
EXPORT int cublasLtMatmulAlgoGetHeuristic(Handle, Handle, Handle, Handle, Handle, Handle, Handle, int, void *,
                                          int *found) {
  return *found = 1, 0;
}
