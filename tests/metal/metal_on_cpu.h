// Metal on a CPU: what g++ needs to compile a kernel's Metal text as it stands, and to run it one threadgroup at a time.
//
// A thread of the threadgroup is a coroutine. It runs until a barrier or a simd operation, which completes when all
// threads that take part have come to the same one; a different one, or the end of the kernel, is an error. Which of the
// threads that can run goes on is the schedule's choice: depth-first in both directions, round-robin, or at random.
// Threadgroup memory holds nonsense before every threadgroup.
#pragma once

#include <setjmp.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <ucontext.h>

#include <cmath>
#include <functional>
#include <vector>

typedef unsigned int uint;
typedef unsigned short ushort;

struct uint3 {
  uint x, y, z;
};

// Floats of 16 bits. Arithmetic between two of them rounds to their type, as on a GPU; with a float, it is a float's.
template <int EXPONENT, int MANTISSA>
struct small_float {
  uint16_t bits;

  small_float() = default;
  explicit small_float(float value) : bits(round(value)) {}
  template <typename V>
  explicit small_float(V value) : small_float(float(value)) {}

  operator float() const {
    const int bias = (1 << (EXPONENT - 1)) - 1;
    const uint fraction = bits & ((1u << MANTISSA) - 1), exponent = (bits >> MANTISSA) & ((1u << EXPONENT) - 1);
    float size;
    if (exponent == (1u << EXPONENT) - 1) {
      size = fraction ? NAN : INFINITY;
    } else {
      size = exponent ? std::ldexp(float((1u << MANTISSA) | fraction), int(exponent) - bias - MANTISSA)
                      : std::ldexp(float(fraction), 1 - bias - MANTISSA);
    }
    return bits >> 15 ? -size : size;
  }

  static uint16_t round(float value) {
    const uint16_t sign = std::signbit(value) ? 0x8000 : 0;
    const uint16_t infinite = ((1u << EXPONENT) - 1) << MANTISSA;
    if (std::isnan(value)) return sign | infinite | 1;
    if (std::isinf(value)) return sign | infinite;
    if (value == 0) return sign;
    const int bias = (1 << (EXPONENT - 1)) - 1;
    int exponent;
    std::frexp(value, &exponent);
    exponent = exponent - 1 < 1 - bias ? 1 - bias : exponent - 1;  // below: subnormal
    const uint whole = uint(std::nearbyint(std::ldexp(double(std::fabs(value)), MANTISSA - exponent)));  // ties to even
    const uint encoded = whole + (uint(exponent + bias - 1) << MANTISSA);
    return sign | uint16_t(encoded < infinite ? encoded : infinite);
  }
};
#define SMALL_FLOAT_OPERATOR(op)                                                                \
  template <int E, int M>                                                                       \
  small_float<E, M> operator op(small_float<E, M> a, small_float<E, M> b) {                     \
    return small_float<E, M>(float(a) op float(b));                                             \
  }
SMALL_FLOAT_OPERATOR(+)
SMALL_FLOAT_OPERATOR(-)
SMALL_FLOAT_OPERATOR(*)

typedef small_float<5, 10> half;
typedef half float16_t;
typedef small_float<8, 7> bfloat16_t;

// ---- The scheduler --------------------------------------------------------------------------------------------------

enum State { READY, AT_SIMD, AT_BARRIER, DONE };
constexpr int SIMD = 32, STACK_BYTES = 64 * 1024;

struct Fiber {
  State state;
  int line;               // of the operation it waits at
  const char* operation;
  uint64_t value;         // what it brings to a simd operation, and takes from it
  ucontext_t context;
  jmp_buf place;
  bool started;
};

static std::vector<Fiber> fibers;
static std::vector<char> stacks;
static ucontext_t scheduler_context;
static jmp_buf scheduler_place;
static std::function<void()> body;
static int current;
static uint3 threadgroup_position, threadgroup_size;

[[noreturn]] static void fail(const char* what, const Fiber& a, const Fiber& b) {
  auto name = [](const Fiber& f) { return f.state == DONE ? "the end" : f.operation; };
  fprintf(stderr, "%s: %s in line %d and %s in line %d\n", what, name(a), a.line, name(b), b.line);
  exit(3);
}

static void enter() {
  body();
  fibers[current].state = DONE;
  _longjmp(scheduler_place, 1);
}

static void wait_at(State state, const char* operation, int line) {
  Fiber& fiber = fibers[current];
  fiber.state = state, fiber.operation = operation, fiber.line = line;
  if (_setjmp(fiber.place) == 0) _longjmp(scheduler_place, 1);
}

static void resume(int i) {
  current = i;
  Fiber& fiber = fibers[i];
  if (_setjmp(scheduler_place)) return;
  if (fiber.started) _longjmp(fiber.place, 1);
  fiber.started = true;
  setcontext(&fiber.context);
}

// Lets threads [first, first + count) go on if all of them wait, for the same thing; then `combine` has their values.
static bool release(int first, int count, State state, const std::function<void(Fiber*)>& combine) {
  bool waits = false, ready = false;
  for (int i = first; i < first + count; i++) {
    waits = waits || fibers[i].state == state;
    ready = ready || fibers[i].state == READY;
  }
  if (!waits || ready) return false;
  for (int i = first; i < first + count; i++) {
    const Fiber &a = fibers[first], &b = fibers[i];
    if (state == AT_BARRIER && (a.state == AT_SIMD || b.state == AT_SIMD)) return false;  // that comes first
    if (a.state != b.state || a.line != b.line || a.operation != b.operation) fail("threads diverge", a, b);
  }
  if (state == AT_SIMD && count < SIMD) fail("a simdgroup is not full", fibers[first], fibers[first]);
  combine(&fibers[first]);
  for (int i = first; i < first + count; i++) fibers[i].state = READY;
  return true;
}

static std::function<void(Fiber*)> combiners[64];  // of each simdgroup's operation in progress

// 0 depth-first, 1 depth-first from the last thread, 2 round-robin, others random with that seed.
static void run_threadgroup(int schedule) {
  const int count = threadgroup_size.x * threadgroup_size.y * threadgroup_size.z;
  static uint64_t random_state = 0;
  if (random_state == 0) random_state = 0x9E3779B97F4A7C15ull * uint64_t(schedule + 1);
  fibers.resize(count);
  stacks.resize(size_t(count) * STACK_BYTES);
  for (int i = 0; i < count; i++) {
    Fiber& fiber = fibers[i];
    fiber.state = READY, fiber.started = false;
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = &stacks[size_t(i) * STACK_BYTES];
    fiber.context.uc_stack.ss_size = STACK_BYTES;
    fiber.context.uc_link = nullptr;
    makecontext(&fiber.context, enter, 0);
  }
  for (int last = count - 1;;) {
    int chosen = -1, ready = 0;
    for (int k = 0; k < count; k++) {
      const int i = schedule == 0 ? k : schedule == 1 ? count - 1 - k : (last + 1 + k) % count;
      if (fibers[i].state != READY) continue;
      if (chosen < 0) chosen = i;
      if (schedule < 3) break;
      random_state = random_state * 6364136223846793005ull + 1442695040888963407ull;
      if ((random_state >> 33) % ++ready == 0) chosen = i;
    }
    if (chosen >= 0) {
      resume(last = chosen);
      const int first = chosen / SIMD * SIMD;
      release(first, count - first < SIMD ? count - first : SIMD, AT_SIMD, combiners[chosen / SIMD]);
      continue;
    }
    if (!release(0, count, AT_BARRIER, [](Fiber*) {})) break;
  }
  for (int i = 0; i < count; i++) {
    if (fibers[i].state != DONE) fail("threads wait for ever", fibers[i], fibers[(i + 1) % count]);
  }
}

// ---- What a kernel calls --------------------------------------------------------------------------------------------

#define device
#define constant
#define threadgroup static __attribute__((section("threadgroup_memory")))

enum class mem_flags { mem_none, mem_device, mem_threadgroup };

inline void threadgroup_barrier(mem_flags, int line = __builtin_LINE()) { wait_at(AT_BARRIER, "threadgroup_barrier", line); }

template <typename V>
uint64_t to_bits(V value) {
  uint64_t bits = 0;
  memcpy(&bits, &value, sizeof value);
  return bits;
}

template <typename V>
V from_bits(uint64_t bits) {
  V value;
  memcpy(&value, &bits, sizeof value);
  return value;
}

// One simd operation: `combine` turns what the lanes bring into what they take.
template <typename R, typename V>
R simd_operation(const char* name, int line, V value, std::function<void(Fiber*)> combine) {
  const int me = current;
  fibers[me].value = to_bits(value);
  combiners[me / SIMD] = combine;
  wait_at(AT_SIMD, name, line);
  return from_bits<R>(fibers[me].value);
}

struct simd_vote {
  typedef uint64_t vote_t;
  vote_t votes;
  explicit operator vote_t() const { return votes; }
};

inline simd_vote simd_ballot(bool vote, int line = __builtin_LINE()) {
  return {simd_operation<uint64_t>("simd_ballot", line, uint64_t(vote), [](Fiber* lanes) {
    uint64_t votes = 0;
    for (int i = 0; i < SIMD; i++) votes |= lanes[i].value << i;
    for (int i = 0; i < SIMD; i++) lanes[i].value = votes;
  })};
}

// Each lane says which lane it wants.
template <typename V>
V simd_exchange(const char* name, V value, uint wanted, int line) {
  static_assert(sizeof(V) <= 4, "a value of 32 bits");
  const uint64_t asks = uint64_t(wanted) << 32 | to_bits(value);
  return from_bits<V>(simd_operation<uint64_t>(name, line, asks, [](Fiber* lanes) {
    uint64_t before[SIMD];
    for (int i = 0; i < SIMD; i++) before[i] = lanes[i].value;
    for (int i = 0; i < SIMD; i++) {
      // Reading a lane that does not exist is undefined on a GPU: here it gives nonsense.
      const uint64_t from = before[i] >> 32;
      lanes[i].value = from < SIMD ? before[from] & 0xffffffffull : 0xABABABABull;
    }
  }));
}

template <typename V>
V simd_shuffle(V value, uint lane, int line = __builtin_LINE()) {
  return simd_exchange("simd_shuffle", value, lane, line);
}

template <typename V>
V simd_shuffle_xor(V value, uint mask, int line = __builtin_LINE()) {
  return simd_exchange("simd_shuffle_xor", value, uint(current % SIMD) ^ mask, line);
}

inline uint simd_prefix_exclusive_sum(uint value, int line = __builtin_LINE()) {
  return uint(simd_operation<uint64_t>("simd_prefix_exclusive_sum", line, uint64_t(value), [](Fiber* lanes) {
    uint64_t sum = 0;
    for (int i = 0; i < SIMD; i++) {
      const uint64_t own = lanes[i].value;
      lanes[i].value = sum;
      sum += own;
    }
  }));
}

inline uint popcount(uint bits) { return __builtin_popcount(bits); }
inline uint min(uint a, uint b) { return a < b ? a : b; }
using std::fma;
