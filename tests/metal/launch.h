// main() of an emulated kernel: arrays between guard pages, every threadgroup of the grid, outputs to files.
//
// Arguments: schedule; grid x y z, threadgroup x y z, in threads; then for each buffer of the kernel "in" or "out", a
// path, and the bytes. Inputs cannot be written to. An array ends where memory ends (under schedule 1 it begins where
// memory begins), so that a read or write outside is a crash. Outputs start as 0xFF: NaN, if nobody writes them.
#pragma once

#include <sys/mman.h>
#include <unistd.h>

extern char __start_threadgroup_memory[] __attribute__((weak));
extern char __stop_threadgroup_memory[] __attribute__((weak));

struct Buffer {
  char* data;
  size_t bytes;
  const char* path;
  bool output;
};

static Buffer open_buffer(const char* kind, const char* path, size_t bytes, bool at_start) {
  const size_t page = sysconf(_SC_PAGESIZE), inside = (bytes + page - 1) / page * page;
  char* memory = (char*)mmap(nullptr, inside + 2 * page, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  mprotect(memory + page, inside, PROT_READ | PROT_WRITE);
  Buffer buffer = {memory + page + (at_start ? 0 : inside - bytes), bytes, path, !strcmp(kind, "out")};
  if (buffer.output) {
    memset(buffer.data, 0xFF, bytes);
    return buffer;
  }
  FILE* file = fopen(path, "rb");
  if (!file || fread(buffer.data, 1, bytes, file) != bytes) fprintf(stderr, "cannot read %s\n", path), exit(2);
  fclose(file);
  mprotect(memory + page, inside, PROT_READ);
  return buffer;
}

static std::vector<Buffer> buffers;
static uint3 whole_threadgroup;  // the last ones of a grid may be cut

template <typename P>
P buffer(size_t i) {
  return (P)buffers[i].data;
}

static void run_kernel();  // calls the kernel as the current thread

int main(int count, char** arguments) {
  const int schedule = atoi(arguments[1]);
  uint sizes[6];
  for (int i = 0; i < 6; i++) sizes[i] = atoi(arguments[2 + i]);
  for (int i = 8; i + 2 < count; i += 3) {
    buffers.push_back(open_buffer(arguments[i], arguments[i + 1], atoll(arguments[i + 2]), schedule == 1));
  }
  const uint3 grid = {sizes[0], sizes[1], sizes[2]}, whole = {sizes[3], sizes[4], sizes[5]};
  whole_threadgroup = whole;
  body = run_kernel;
  uint3& at = threadgroup_position;
  for (at.z = 0; at.z * whole.z < grid.z; at.z++) {
    for (at.y = 0; at.y * whole.y < grid.y; at.y++) {
      for (at.x = 0; at.x * whole.x < grid.x; at.x++) {
        // Metal cuts the last threadgroup to the grid.
        threadgroup_size = {min(whole.x, grid.x - at.x * whole.x), min(whole.y, grid.y - at.y * whole.y),
                            min(whole.z, grid.z - at.z * whole.z)};
        const int nonsense[3] = {0xFF, 0x7F, 0x00};
        memset(__start_threadgroup_memory, nonsense[schedule % 3], __stop_threadgroup_memory - __start_threadgroup_memory);
        run_threadgroup(schedule);
      }
    }
  }
  for (const Buffer& buffer : buffers) {
    if (!buffer.output) continue;
    FILE* file = fopen(buffer.path, "wb");
    fwrite(buffer.data, 1, buffer.bytes, file);
    fclose(file);
  }
}

// Where the current thread is, under Metal's names.
static uint3 position_in_threadgroup() {
  const uint i = current, x = threadgroup_size.x, y = threadgroup_size.y;
  return {i % x, i / x % y, i / x / y};
}

static uint find_thread_index_in_simdgroup() { return current % SIMD; }
static uint find_simdgroup_index_in_threadgroup() { return current / SIMD; }
static uint3 find_threadgroup_position_in_grid() { return threadgroup_position; }
static uint3 find_thread_position_in_grid() {
  const uint3 inside = position_in_threadgroup(), at = threadgroup_position, whole = whole_threadgroup;
  return {at.x * whole.x + inside.x, at.y * whole.y + inside.y, at.z * whole.z + inside.z};
}
