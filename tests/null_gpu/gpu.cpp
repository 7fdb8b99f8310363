// The devices of the null GPU, their memory, the counts, and the functions by which counts.py reads them.
#include "gpu.h"

#include <sys/mman.h>

#include <atomic>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <map>
#include <mutex>
#include <string>

static const int MOST_DEVICES = 16;

static double setting(const char *name, double otherwise) {
  const char *text = getenv(name);
  return text && *text ? atof(text) : otherwise;
}

// Devices ------------------------------------------------------------------------------------------------------------

const Model &model() {
  static const Model h100 = {"NVIDIA H100 80GB HBM3", 9, 0, 132, 232448, 233472, 50 << 20, 5120};
  static const Model a100 = {"NVIDIA A100-SXM4-80GB", 8, 0, 108, 166912, 167936, 40 << 20, 5120};
  static const Model &chosen = setting("NULL_GPU_CAPABILITY", 9.0) < 9 ? a100 : h100;
  return chosen;
}

int devices() {
  static const int n = int(setting("NULL_GPUS", 1));
  return n < MOST_DEVICES ? n : MOST_DEVICES;
}

size_t capacity() {
  static const size_t bytes = size_t(setting("NULL_GPU_GIB", 79.1) * (1 << 30));
  return bytes;
}

int attribute(int which) {
  switch (which) {
    case 1: case 2: case 3: return 1024;             // threads in a block, and along its x and y
    case 4: return 64;                               // along z
    case 5: return 2147483647;                       // blocks along x
    case 6: case 7: return 65535;                    // along y and z
    case 8: return 49152;                            // bytes of shared memory in a block, unless it asks for more
    case 9: return 65536;                            // bytes of constants
    case 10: return 32;                              // threads in a warp
    case 12: case 82: return 65536;                  // registers in a block, in a multiprocessor
    case 13: return 1980000;                         // kHz
    case 16: return model().processors;
    case 36: return 2619000;                         // kHz of the memory
    case 37: return model().memory_bus_bits;
    case 38: return model().l2_bytes;
    case 39: return 2048;                            // threads in a multiprocessor
    case 75: return model().major;
    case 76: return model().minor;
    case 81: return model().shared_per_processor;
    case 97: return model().shared_per_block;        // if it asks
    case 106: return 32;                             // blocks in a multiprocessor
    case 19: case 31: case 41: case 83: case 95: case 102: return 1;  // mapped host memory, concurrent kernels, unified
                                                                      // addresses, managed memory, cooperative
                                                                      // launches, virtual memory management
    default: return 0;
  }
}

thread_local int device = 0;
static std::atomic<unsigned> contexts{0};

void use(int which) { contexts |= 1u << which; }
bool has_context(int which) { return contexts >> which & 1; }

// Memory -------------------------------------------------------------------------------------------------------------

static std::mutex lock;
static std::map<uintptr_t, Block> blocks;  // by their first address
static std::atomic<size_t> used_on[MOST_DEVICES];

void *take(size_t bytes, Kind kind) {
  bytes += bytes == 0;
  void *start = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (start == MAP_FAILED) return nullptr;
  std::lock_guard<std::mutex> guard(lock);
  blocks[uintptr_t(start)] = {bytes, kind, device};
  return start;
}

void pin(void *host, size_t bytes) {
  std::lock_guard<std::mutex> guard(lock);
  blocks[uintptr_t(host)] = {bytes, PINNED, device};
}

Block let_go(void *start, bool unmap) {
  Block block;
  {
    std::lock_guard<std::mutex> guard(lock);
    auto found = blocks.find(uintptr_t(start));
    if (found == blocks.end()) return block;
    block = found->second;
    blocks.erase(found);
  }
  if (unmap) munmap(start, block.bytes);
  return block;
}

Block block_of(const void *address) {
  std::lock_guard<std::mutex> guard(lock);
  auto after = blocks.upper_bound(uintptr_t(address));
  if (after == blocks.begin()) return {};
  auto &[start, block] = *--after;
  return uintptr_t(address) < start + block.bytes ? block : Block{};
}

bool take_from_device(size_t bytes) {
  count(ALLOCATIONS);
  if ((used_on[device] += bytes) <= capacity()) return true;
  used_on[device] -= bytes;
  return false;
}

void return_to_device(size_t bytes, int which) {
  count(RELEASES);
  used_on[which] -= bytes;
}

size_t used(int which) { return used_on[which]; }

// Counts -------------------------------------------------------------------------------------------------------------

static std::atomic<long> counted[N_COUNTS];
static std::atomic<bool> by_name{false};
static std::map<std::string, long> kernels;  // launches by name, while by_name

void count(Count what, long by) { counted[what] += by; }

void count_launch(const char *kernel) {
  count(LAUNCHES);
  if (!by_name) return;
  std::lock_guard<std::mutex> guard(lock);
  kernels[kernel]++;
}

EXPORT long null_gpu_count(int what) { return counted[what]; }
EXPORT unsigned null_gpu_contexts() { return contexts; }  // a bit for each device

EXPORT void null_gpu_by_name(int on) { by_name = on; }
// Write "launches, tab, name" lines to a file, and begin anew.
EXPORT int null_gpu_write_names(const char *path) {
  std::lock_guard<std::mutex> guard(lock);
  FILE *file = fopen(path, "w");
  if (!file) return 1;
  for (auto &[name, launches] : kernels) fprintf(file, "%ld\t%s\n", launches, name.c_str());
  kernels.clear();
  return fclose(file);
}
