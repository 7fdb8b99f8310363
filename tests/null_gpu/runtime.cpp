// The CUDA runtime of the null GPU (libcudart): what torch calls of it. All work is done when a function returns, and it
// changes nothing: the memory of the devices is zeros, whatever is copied there, so that what a program reads is the same
// in each run, and finite.
#include "gpu.h"

#include <dlfcn.h>

#include <cstdint>
#include <cstdio>
#include <cstring>
#include <unordered_map>

enum { SUCCESS = 0, OUT_OF_MEMORY = 2, NOT_REGISTERED = 713, NOT_SUPPORTED = 801 };
typedef void *Handle;  // of a stream, an event or a kernel

// Devices ------------------------------------------------------------------------------------------------------------

EXPORT int cudaGetDeviceCount(int *n) { return *n = devices(), SUCCESS; }
EXPORT int cudaGetDevice(int *which) { return *which = device, SUCCESS; }
EXPORT int cudaSetDevice(int which) { return use(device = which), SUCCESS; }
EXPORT int cudaDeviceGetAttribute(int *value, int which) { return *value = attribute(which), SUCCESS; }
EXPORT int cudaDeviceGetPCIBusId(char *text, int size, int which) {
  return snprintf(text, size, "0000:%02x:00.0", which), SUCCESS;
}
EXPORT int cudaDeviceGetStreamPriorityRange(int *least, int *greatest) {
  if (least) *least = 0;
  if (greatest) *greatest = -5;
  return SUCCESS;
}
EXPORT int cudaDeviceCanAccessPeer(int *can) { return *can = 1, SUCCESS; }
EXPORT int cudaDriverGetVersion(int *version) { return *version = 13000, SUCCESS; }
EXPORT int cudaRuntimeGetVersion(int *version) { return *version = 13000, SUCCESS; }
SUCCEEDS(cudaDeviceEnablePeerAccess)
SUCCEEDS(cudaGetLastError)
SUCCEEDS(cudaPeekAtLastError)
SUCCEEDS(cudaProfilerStart)
SUCCEEDS(cudaProfilerStop)

// Memory -------------------------------------------------------------------------------------------------------------

EXPORT int cudaMalloc(void **start, size_t bytes) {
  use();
  *start = take_from_device(bytes) ? take(bytes, DEVICE) : nullptr;
  return *start ? SUCCESS : OUT_OF_MEMORY;
}
EXPORT int cudaFree(void *start) {
  use();
  if (!start) return SUCCESS;
  Block block = let_go(start, true);
  return return_to_device(block.bytes, block.device), SUCCESS;
}
EXPORT int cudaMemGetInfo(size_t *free, size_t *total) {
  use();
  return *total = capacity(), *free = capacity() - used(device), SUCCESS;
}

EXPORT int cudaHostAlloc(void **start, size_t bytes) {
  use();
  count(BYTES_PINNED, bytes);
  return (*start = take(bytes, PINNED)) ? SUCCESS : OUT_OF_MEMORY;
}
EXPORT int cudaMallocHost(void **start, size_t bytes) { return cudaHostAlloc(start, bytes); }
EXPORT int cudaFreeHost(void *start) { return let_go(start, true), SUCCESS; }
EXPORT int cudaHostRegister(void *start, size_t bytes) {
  use();
  count(BYTES_PINNED, bytes);
  return pin(start, bytes), SUCCESS;
}
EXPORT int cudaHostUnregister(void *start) { return let_go(start, false).bytes ? SUCCESS : NOT_REGISTERED; }
EXPORT int cudaHostGetDevicePointer(void **seen_by_device, void *host) { return *seen_by_device = host, SUCCESS; }

// A copy from or to memory that is not pinned is counted as such too: CUDA makes the host wait for much of it.
static int copy(void *to, const void *from, size_t bytes) {
  use();
  Kind source = block_of(from).kind, target = block_of(to).kind;
  if (source == DEVICE && target == DEVICE) {
    count(COPIES_WITHIN);
  } else if (source == DEVICE) {
    count(COPIES_OUT), count(BYTES_OUT, bytes);
  } else {
    count(COPIES_IN), count(BYTES_IN, bytes);
  }
  if (source == PAGEABLE || target == PAGEABLE) count(PAGEABLE_COPIES);
  if (target != DEVICE) source == DEVICE ? memset(to, 0, bytes) : memcpy(to, from, bytes);
  return SUCCESS;
}
EXPORT int cudaMemcpy(void *to, const void *from, size_t bytes) { return count(WAITS), copy(to, from, bytes); }
EXPORT int cudaMemcpyAsync(void *to, const void *from, size_t bytes) { return copy(to, from, bytes); }
EXPORT int cudaMemcpyPeerAsync(void *to, int, const void *from, int, size_t bytes) { return copy(to, from, bytes); }
SUCCEEDS(cudaMemcpyToSymbol)

EXPORT int cudaMemset() { return use(), count(FILLS), SUCCESS; }
EXPORT int cudaMemsetAsync() { return use(), count(FILLS), SUCCESS; }
EXPORT int cudaGetSymbolAddress(void **start) {
  static char variables[1 << 16];
  return *start = variables, SUCCESS;
}

// Streams and events -------------------------------------------------------------------------------------------------

static int make(Handle *handle) {
  static uintptr_t last = 0;
  use();
  return *handle = Handle(__atomic_add_fetch(&last, 16, __ATOMIC_RELAXED)), SUCCESS;
}
static int done() { return use(), SUCCESS; }
static int wait() { return count(WAITS), done(); }

EXPORT int cudaStreamCreate(Handle *stream) { return make(stream); }
EXPORT int cudaStreamCreateWithFlags(Handle *stream) { return make(stream); }
EXPORT int cudaStreamCreateWithPriority(Handle *stream) { return make(stream); }
EXPORT int cudaEventCreate(Handle *event) { return make(event); }
EXPORT int cudaEventCreateWithFlags(Handle *event) { return make(event); }
EXPORT int cudaDeviceSynchronize() { return wait(); }
EXPORT int cudaStreamSynchronize() { return wait(); }
EXPORT int cudaEventSynchronize() { return wait(); }
EXPORT int cudaStreamQuery() { return done(); }
EXPORT int cudaStreamWaitEvent() { return done(); }
EXPORT int cudaEventQuery() { return done(); }
EXPORT int cudaEventRecord() { return done(); }
EXPORT int cudaEventRecordWithFlags() { return done(); }
EXPORT int cudaEventElapsedTime(float *milliseconds) { return *milliseconds = 0.1f, SUCCESS; }
EXPORT int cudaStreamGetPriority(Handle, int *priority) { return *priority = 0, SUCCESS; }
EXPORT int cudaStreamGetFlags(Handle, unsigned *flags) { return *flags = 0, SUCCESS; }
SUCCEEDS(cudaStreamDestroy)
SUCCEEDS(cudaEventDestroy)

EXPORT int cudaLaunchHostFunc(Handle, void (*function)(void *), void *argument) {
  return function(argument), SUCCESS;
}
EXPORT int cudaStreamAddCallback(Handle stream, void (*function)(Handle, int, void *), void *argument) {
  return function(stream, SUCCESS, argument), SUCCESS;
}

// No stream is ever captured into a graph.
EXPORT int cudaStreamIsCapturing(Handle, int *status) { return *status = 0, SUCCESS; }
EXPORT int cudaStreamGetCaptureInfo(Handle, int *status, unsigned long long *id) {
  if (id) *id = 0;
  return *status = 0, SUCCESS;
}
SUCCEEDS(cudaThreadExchangeStreamCaptureMode)

// Kernels: known by the address of their host function, which registers their name when a library is loaded ----------

static std::unordered_map<const void *, const char *> &names() {
  static auto *map = new std::unordered_map<const void *, const char *>;  // libraries may still be unloaded at exit
  return *map;
}
static int launch(const void *kernel) {
  use();
  auto found = names().find(kernel);
  return count_launch(found == names().end() ? "?" : found->second), SUCCESS;
}

EXPORT void **__cudaRegisterFatBinary() {
  static void *binary;
  return &binary;
}
EXPORT void __cudaRegisterFunction(void **, const void *kernel, char *, const char *name) { names()[kernel] = name; }
SUCCEEDS(__cudaRegisterFatBinaryEnd)
SUCCEEDS(__cudaUnregisterFatBinary)
SUCCEEDS(__cudaRegisterVar)
SUCCEEDS(__cudaInitModule)
// Between these two a compiled call carries the shape of its launch, at which nothing here looks.
SUCCEEDS(__cudaPushCallConfiguration)
SUCCEEDS(__cudaPopCallConfiguration)
EXPORT int __cudaGetKernel(const void **kernel, const void *host_function) { return *kernel = host_function, SUCCESS; }
EXPORT int __cudaLaunchKernel(const void *kernel) { return launch(kernel); }
EXPORT int cudaLaunchKernel(const void *kernel) { return launch(kernel); }
EXPORT int cudaLaunchKernelExC(const void *, const void *kernel) { return launch(kernel); }
EXPORT int cudaLaunchCooperativeKernel(const void *kernel) { return launch(kernel); }

SUCCEEDS(cudaFuncSetAttribute)
SUCCEEDS(cudaKernelSetAttributeForDevice)
EXPORT int cudaOccupancyMaxActiveBlocksPerMultiprocessor(int *blocks) { return *blocks = 2, SUCCESS; }
EXPORT int cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int *blocks) { return *blocks = 2, SUCCESS; }
EXPORT int cudaOccupancyMaxPotentialBlockSize(int *grid, int *block) {
  return *grid = model().processors, *block = 256, SUCCESS;
}

// The driver's functions, which torch asks the runtime for: those of driver.cpp, in this library as well.
static int unsupported() { return NOT_SUPPORTED; }
EXPORT int cudaGetDriverEntryPointByVersion(const char *name, void **function, unsigned, unsigned long long, int *how) {
  *function = dlsym(RTLD_DEFAULT, name);
  if (!*function) *function = reinterpret_cast<void *>(unsupported);
  if (how) *how = 0;
  return SUCCESS;
}
