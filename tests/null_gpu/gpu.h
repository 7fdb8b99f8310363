// What the parts of the null GPU share: the devices it presents, their memory, and what is counted.
#pragma once
#include <cstddef>

// A function that a program may call. C's calling convention lets a stand-in leave out the arguments it ignores, so
// that most need no CUDA header; SUCCEEDS is one that ignores them all.
#define EXPORT extern "C" __attribute__((visibility("default")))
#define SUCCEEDS(name) EXPORT int name() { return 0; }

// Devices, the same number for the runtime, the driver and NVML.
struct Model {
  const char *name;
  int major, minor, processors, shared_per_block, shared_per_processor, l2_bytes, memory_bus_bits;
};
const Model &model();
int devices();
size_t capacity();        // bytes of each
int attribute(int which); // by the number that cudaDeviceAttr and CUdevice_attribute have in common

// The calling thread's device. Like CUDA's it is device 0 until the thread sets it, and what uses it makes a context
// there, which takes half a gigabyte on a real GPU.
extern thread_local int device;
void use(int which = device);
bool has_context(int which);

// Memory, in the host's address space. That of the devices is never written to, and takes no RAM.
enum Kind { PAGEABLE, PINNED, DEVICE };
struct Block {
  size_t bytes = 0;
  Kind kind = PAGEABLE;
  int device = 0;
};
void *take(size_t bytes, Kind kind);
bool take_from_device(size_t bytes);         // whether there is room; counted as used then
void return_to_device(size_t bytes, int which);
void pin(void *host, size_t bytes);          // memory that the program has allocated itself
Block let_go(void *start, bool unmap);
Block block_of(const void *address);
size_t used(int which);

// Counts. The order is that of NAMES in counts.py.
enum Count {
  LAUNCHES, PRODUCTS, WAITS, COPIES_IN, COPIES_OUT, COPIES_WITHIN, PAGEABLE_COPIES, FILLS, ALLOCATIONS, RELEASES,
  BYTES_IN, BYTES_OUT, BYTES_PINNED, N_COUNTS
};
void count(Count what, long by = 1);
void count_launch(const char *kernel);
