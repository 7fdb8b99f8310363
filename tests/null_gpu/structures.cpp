// The functions of the CUDA runtime that fill structures. These are laid out by CUDA's own header, which comes with
// torch: the one part of the null GPU that is tied to a version of CUDA.
#include "gpu.h"

#include <driver_types.h>

#include <cstring>

EXPORT int cudaGetDeviceProperties(cudaDeviceProp *p, int) {
  memset(p, 0, sizeof *p);
  strcpy(p->name, model().name);
  p->totalGlobalMem = capacity();
  p->major = attribute(75);
  p->minor = attribute(76);
  p->multiProcessorCount = attribute(16);
  p->warpSize = attribute(10);
  p->maxThreadsPerBlock = attribute(1);
  for (int i = 0; i < 3; i++) {
    p->maxThreadsDim[i] = attribute(2 + i);
    p->maxGridSize[i] = attribute(5 + i);
  }
  p->sharedMemPerBlock = attribute(8);
  p->sharedMemPerBlockOptin = attribute(97);
  p->sharedMemPerMultiprocessor = attribute(81);
  p->totalConstMem = attribute(9);
  p->regsPerBlock = attribute(12);
  p->regsPerMultiprocessor = attribute(82);
  p->maxThreadsPerMultiProcessor = attribute(39);
  p->maxBlocksPerMultiProcessor = attribute(106);
  p->memoryBusWidth = attribute(37);
  p->l2CacheSize = attribute(38);
  p->textureAlignment = 512;
  p->asyncEngineCount = 3;
  p->concurrentKernels = p->unifiedAddressing = p->managedMemory = p->canMapHostMemory = 1;
  return cudaSuccess;
}

EXPORT int cudaFuncGetAttributes(cudaFuncAttributes *a, const void *) {
  memset(a, 0, sizeof *a);
  a->ptxVersion = a->binaryVersion = 10 * model().major + model().minor;
  a->maxThreadsPerBlock = attribute(1);
  a->numRegs = 32;
  a->maxDynamicSharedSizeBytes = model().shared_per_block;
  return cudaSuccess;
}

EXPORT int cudaPointerGetAttributes(cudaPointerAttributes *a, const void *address) {
  static const cudaMemoryType types[] = {cudaMemoryTypeUnregistered, cudaMemoryTypeHost, cudaMemoryTypeDevice};
  memset(a, 0, sizeof *a);
  Block block = block_of(address);
  a->type = types[block.kind];
  a->device = block.kind == PAGEABLE ? -1 : block.device;
  if (block.kind != PAGEABLE) a->devicePointer = const_cast<void *>(address);
  if (block.kind != DEVICE) a->hostPointer = const_cast<void *>(address);
  return cudaSuccess;
}
