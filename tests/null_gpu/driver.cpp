// The CUDA driver (libcuda.so.1) and NVML (libnvidia-ml.so.1) of the null GPU: what torch and Triton's launcher call.
#include "gpu.h"

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>

enum { SUCCESS = 0, INVALID_VALUE = 1, OUT_OF_MEMORY = 2, NOT_SUPPORTED_BY_NVML = 3 };
typedef void *Handle;

// Devices and contexts: the handle of a device's context is its number and one ---------------------------------------

SUCCEEDS(cuInit)
EXPORT int cuDriverGetVersion(int *version) { return *version = 13000, SUCCESS; }
EXPORT int cuDeviceGetCount(int *n) { return *n = devices(), SUCCESS; }
EXPORT int cuDeviceGet(int *handle, int which) { return *handle = which, SUCCESS; }
EXPORT int cuDeviceGetName(char *text, int size) { return snprintf(text, size, "%s", model().name), SUCCESS; }
EXPORT int cuDeviceGetAttribute(int *value, int which) { return *value = attribute(which), SUCCESS; }

EXPORT int cuDevicePrimaryCtxGetState(int which, unsigned *flags, int *active) {
  return *flags = 0, *active = has_context(which), SUCCESS;
}
EXPORT int cuDevicePrimaryCtxRetain(Handle *context, int which) {
  return use(which), *context = Handle(uintptr_t(which) + 1), SUCCESS;
}
SUCCEEDS(cuDevicePrimaryCtxRelease_v2)
EXPORT int cuCtxGetCurrent(Handle *context) {
  return *context = has_context(device) ? Handle(uintptr_t(device) + 1) : nullptr, SUCCESS;
}
EXPORT int cuCtxSetCurrent(Handle context) {
  if (context) use(device = int(uintptr_t(context)) - 1);
  return SUCCESS;
}
EXPORT int cuCtxGetDevice(int *which) { return *which = device, SUCCESS; }
EXPORT int cuCtxGetLimit(size_t *value) { return *value = 1 << 20, SUCCESS; }
SUCCEEDS(cuCtxSetLimit)

static int say(const char **text) { return *text = "an error of the null GPU", SUCCESS; }
EXPORT int cuGetErrorString(int, const char **text) { return say(text); }
EXPORT int cuGetErrorName(int, const char **text) { return say(text); }

// Compiled kernels: a module is nothing, a function its name ---------------------------------------------------------

static int load(Handle *module) {
  static int nothing;
  return *module = &nothing, SUCCESS;
}
EXPORT int cuModuleLoad(Handle *module) { return load(module); }
EXPORT int cuModuleLoadData(Handle *module) { return load(module); }
EXPORT int cuModuleLoadDataEx(Handle *module) { return load(module); }
SUCCEEDS(cuModuleUnload)
EXPORT int cuModuleGetFunction(Handle *function, Handle, const char *name) { return *function = strdup(name), SUCCESS; }
EXPORT int cuFuncGetAttribute(int *value, int which) {
  return *value = which == 0 ? attribute(1) : which == 4 ? 32 : 0, SUCCESS;  // the most threads, registers; no spills
}
SUCCEEDS(cuFuncSetAttribute)
SUCCEEDS(cuFuncSetCacheConfig)
EXPORT int cuOccupancyMaxActiveBlocksPerMultiprocessor(int *blocks) { return *blocks = 2, SUCCESS; }
EXPORT int cuOccupancyMaxActiveClusters(int *clusters) { return *clusters = 1, SUCCESS; }

static int launch(Handle function) { return use(), count_launch(static_cast<const char *>(function)), SUCCESS; }
EXPORT int cuLaunchKernel(Handle function) { return launch(function); }
EXPORT int cuLaunchCooperativeKernel(Handle function) { return launch(function); }
EXPORT int cuLaunchKernelEx(void *, Handle function) { return launch(function); }

// Triton refuses a pointer that a kernel could not follow by this.
EXPORT int cuPointerGetAttribute(void **value, int, void *address) {
  if (block_of(address).kind == PAGEABLE) return INVALID_VALUE;
  return *value = address, SUCCESS;
}
SUCCEEDS(cuTensorMapEncodeTiled)
SUCCEEDS(cuTensorMapEncodeIm2col)
SUCCEEDS(cuLinkCreate_v2)
SUCCEEDS(cuLinkAddData_v2)
SUCCEEDS(cuLinkComplete)

// Virtual memory, by which expandable segments grow: addresses are taken first and given memory piece by piece. A piece
// is told by its size and, in the lowest bits, its device.

static const size_t PAGE = 2 << 20;
EXPORT int cuMemGetAllocationGranularity(size_t *bytes) { return *bytes = PAGE, SUCCESS; }
EXPORT int cuMemAddressReserve(void **start, size_t bytes) {
  return (*start = take(bytes, DEVICE)) ? SUCCESS : OUT_OF_MEMORY;
}
EXPORT int cuMemAddressFree(void *start) { return let_go(start, true), SUCCESS; }
EXPORT int cuMemCreate(size_t *piece, size_t bytes) {
  use();
  if (!take_from_device(bytes)) return OUT_OF_MEMORY;
  return *piece = bytes | size_t(device), SUCCESS;
}
EXPORT int cuMemRelease(size_t piece) { return return_to_device(piece & ~(PAGE - 1), piece & (PAGE - 1)), SUCCESS; }
SUCCEEDS(cuMemUnmap)
SUCCEEDS(cuMemMap)
SUCCEEDS(cuMemSetAccess)

// NVML: what torch asks before and beside CUDA -----------------------------------------------------------------------

SUCCEEDS(nvmlInit)
SUCCEEDS(nvmlInit_v2)
SUCCEEDS(nvmlShutdown)
EXPORT int nvmlDeviceGetCount_v2(int *n) { return *n = devices(), SUCCESS; }
EXPORT int nvmlDeviceGetHandleByIndex_v2(int which, Handle *handle) {
  return *handle = Handle(uintptr_t(which) + 1), SUCCESS;
}
EXPORT int nvmlDeviceGetHandleByPciBusId_v2(const char *bus, Handle *handle) {
  return nvmlDeviceGetHandleByIndex_v2(int(strtol(bus + 5, nullptr, 16)), handle);  // cudaDeviceGetPCIBusId's
}
EXPORT int nvmlSystemGetCudaDriverVersion_v2(int *version) { return *version = 13000, SUCCESS; }
static int refuse() { return NOT_SUPPORTED_BY_NVML; }
EXPORT int nvmlDeviceGetComputeRunningProcesses() { return refuse(); }
EXPORT int nvmlDeviceGetGpuFabricInfoV() { return refuse(); }
EXPORT int nvmlDeviceGetNvLinkRemoteDeviceType() { return refuse(); }
EXPORT int nvmlDeviceGetNvLinkRemotePciInfo_v2() { return refuse(); }
EXPORT int nvmlDeviceGetUUID() { return refuse(); }
