// partials[s] = relu2(x) @ W over the neurons of slab s: the rows of neurons that are zero for every token are not read.
//
// x         T (TOKENS, NEURONS): what relu2 takes, not what it gives
// weights   W (NEURONS, HIDDEN * BITS / bits of W): uint32 codes, or floats of type T
// scales    (NEURONS, HIDDEN / GROUP), biases the same: a weight is code * scale + bias; not read where W is a float
// partials  float32 (SLABS, TOKENS, HIDDEN)
//
// Template: T, W; TOKENS, NEURONS, HIDDEN; BITS of a weight (4, 8; 16, 32 for floats); GROUP; WORDS that a lane reads at
// once, at most 16 bytes, which divide a row and lie in one group; SLABS, enough for 1,024 neurons or fewer in each.
// Threadgroups: 256 threads, 8 simdgroups; (ceil(HIDDEN / BLOCK), SLABS). Threadgroup memory: 12.2 KiB at 4 bits.
// Chunk c of 32 neurons is in slab c % SLABS, so that slabs have equal work when neurons are sorted by activity.
// No atomics: every sum has a fixed order and the result is repeatable to the bit.

constexpr uint PER_WORD = 8 * sizeof(W) / BITS;
constexpr uint ROW = HIDDEN / PER_WORD;         // words of a row
constexpr uint LINE = 128 / sizeof(W);          // words of a row that this threadgroup reads: a cache line
constexpr uint BLOCK = LINE * PER_WORD;         // columns of this threadgroup
constexpr uint LANES = LINE / WORDS;            // lanes that share a row
constexpr uint ROWS = 32 / LANES;               // rows that a simdgroup reads at once
constexpr uint COLUMNS = WORDS * PER_WORD;      // columns of a lane
constexpr uint STRIDE = 8 * ROWS;               // rows that the threadgroup reads at once
constexpr uint AHEAD = 4;                       // reads of a lane in flight
constexpr bool PACKED = BITS <= 8;
constexpr uint CODE = PACKED ? (1u << (BITS % 32)) - 1 : 0;

struct alignas(sizeof(W) * WORDS) Words {
  W at[WORDS];
};

threadgroup uint masks[32];
threadgroup uint rows[1024];
threadgroup float sums[8 * BLOCK];

const uint slab = threadgroup_position_in_grid.y;
const uint lane = thread_index_in_simdgroup;
const uint simd_group = simdgroup_index_in_threadgroup;

// Which neurons are active: a bit each. NaN is: it is not <= 0.
for (uint i = simd_group; i < 32; i += 8) {
  const uint neuron = (i * SLABS + slab) * 32 + lane;
  bool active = false;
  if (neuron < NEURONS) {
    for (uint m = 0; m < TOKENS; m++) {
      active = active || !(float(x[m * NEURONS + neuron]) <= 0.0f);
    }
  }
  const uint mask = uint(simd_vote::vote_t(simd_ballot(active)));
  if (lane == 0) {
    masks[i] = mask;
  }
}
threadgroup_barrier(mem_flags::mem_threadgroup);

// The list of them. Each simdgroup holds all 32 masks, one a lane, and so every chunk's place in the list.
const uint mask = masks[lane];
const uint before = simd_prefix_exclusive_sum(uint(popcount(mask)));
const uint count = simd_shuffle(before + uint(popcount(mask)), 31);
for (uint i = simd_group; i < 32; i += 8) {
  const uint own = simd_shuffle(mask, i);
  const uint first = simd_shuffle(before, i);
  if ((own >> lane) & 1) {
    rows[first + uint(popcount(own & ((1u << lane) - 1)))] = (i * SLABS + slab) * 32 + lane;
  }
}
threadgroup_barrier(mem_flags::mem_threadgroup);

// Their sum. A code is masked where it stands in its word and so is too large by a power of two, taken back at the end.
const uint block = threadgroup_position_in_grid.x * BLOCK;
const uint column = block + (lane % LANES) * COLUMNS;
float sum[TOKENS][COLUMNS] = {};
float offset[TOKENS] = {};  // of the biases
if (column < HIDDEN) {
  for (uint first = simd_group * ROWS + lane / LANES; first < count; first += STRIDE * AHEAD) {
    Words words[AHEAD];
    float scale[AHEAD];
    float bias[AHEAD];
    uint row[AHEAD];
#pragma unroll
    for (uint u = 0; u < AHEAD; u++) {
      row[u] = rows[min(first + u * STRIDE, count - 1)];  // past the end: a row that is read anyway, with weight 0
      words[u] = *(const device Words*)(weights + row[u] * ROW + column / PER_WORD);
      scale[u] = PACKED ? float(scales[row[u] * (HIDDEN / GROUP) + column / GROUP]) : 1.0f;
      bias[u] = PACKED ? float(biases[row[u] * (HIDDEN / GROUP) + column / GROUP]) : 0.0f;
    }
#pragma unroll
    for (uint u = 0; u < AHEAD; u++) {
      float scaled[TOKENS];
#pragma unroll
      for (uint m = 0; m < TOKENS; m++) {
        const float value = float(x[m * NEURONS + row[u]]);
        const float neuron = first + u * STRIDE >= count || value <= 0.0f ? 0.0f : value * value;
        scaled[m] = neuron * scale[u];
        offset[m] = fma(neuron, bias[u], offset[m]);
      }
#pragma unroll
      for (uint c = 0; c < COLUMNS; c++) {
        const W word = words[u].at[c / PER_WORD];
        const float weight = PACKED ? float(uint(word) & (CODE << (BITS * (c % PER_WORD) % 32))) : float(word);
#pragma unroll
        for (uint m = 0; m < TOKENS; m++) {
          sum[m][c] = fma(scaled[m], weight, sum[m][c]);
        }
      }
    }
  }
}

// Over the rows of a simdgroup by shuffles, over the simdgroups in threadgroup memory, a token at a time.
#pragma unroll
for (uint m = 0; m < TOKENS; m++) {
#pragma unroll
  for (uint c = 0; c < COLUMNS; c++) {
    float total = fma(sum[m][c], 1.0f / float(1u << (BITS * (c % PER_WORD) % 32)), offset[m]);
    for (uint step = LANES; step < 32; step *= 2) {
      total += simd_shuffle_xor(total, step);
    }
    if (c % ROWS == lane / LANES) {
      sums[simd_group * BLOCK + (lane % LANES) * COLUMNS + c] = total;
    }
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
  const uint thread_column = simd_group * 32 + lane;
  if (thread_column < BLOCK && block + thread_column < HIDDEN) {
    float total = 0.0f;
    for (uint i = 0; i < 8; i++) {
      total += sums[i * BLOCK + thread_column];
    }
    partials[(slab * TOKENS + m) * HIDDEN + block + thread_column] = total;
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
}
