// What the kernels' Metal text means in CUDA: 32 lanes of a simdgroup are a warp, threadgroup memory is shared memory.

typedef unsigned int uint;

#define threadgroup __shared__
#define threadgroup_barrier(flags) __syncthreads()
#define threadgroup_position_in_grid blockIdx
#define thread_position_in_grid \
  uint3 { blockIdx.x * blockDim.x + threadIdx.x, blockIdx.y * blockDim.y + threadIdx.y, blockIdx.z * blockDim.z + threadIdx.z }
#define thread_index_in_simdgroup (threadIdx.x % 32)
#define simdgroup_index_in_threadgroup (threadIdx.x / 32)

struct simd_vote {
  typedef unsigned int vote_t;
};

__device__ inline uint simd_ballot(bool vote) {
  return __ballot_sync(0xffffffffu, vote);
}

template <typename V>
__device__ inline V simd_shuffle(V value, uint lane) {
  return __shfl_sync(0xffffffffu, value, lane);
}

template <typename V>
__device__ inline V simd_shuffle_xor(V value, uint mask) {
  return __shfl_xor_sync(0xffffffffu, value, mask);
}

__device__ inline uint simd_prefix_exclusive_sum(uint value) {
  uint sum = value;
  for (uint step = 1; step < 32; step *= 2) {
    const uint below = __shfl_up_sync(0xffffffffu, sum, step);
    sum += threadIdx.x % 32 >= step ? below : 0;
  }
  return sum - value;
}

__device__ inline uint popcount(uint bits) {
  return __popc(bits);
}

// Last: CUDA's own __device__ is made of this word.
#define device
