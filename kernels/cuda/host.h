// The CUDA that our kernels use, as plain C++20: the very same source runs in tests on a machine without a GPU.
//
// A block is as many threads of the operating system as it has CUDA threads. Blocks run one after the other, on the same
// threads, so `static` is shared by one block at a time. Slow: for correctness only, with small blocks.
//
// Two rules for a kernel: no warp intrinsics, and either all threads of a block reach a barrier or none does.
#pragma once
#define LIVEMOMENTS_HOST

#include <algorithm>
#include <barrier>
#include <cmath>
#include <cstddef>
#include <thread>
#include <utility>
#include <vector>

#define __global__
#define __device__
#define __forceinline__ inline
#define __launch_bounds__(threads)
#define __restrict__ __restrict
#define __shared__ static

using std::max;
using std::min;

struct dim3 {
    unsigned x = 1, y = 1, z = 1;
};

inline dim3 gridDim, blockDim;
inline thread_local dim3 blockIdx, threadIdx;
inline std::barrier<>* block_barrier;

inline void __syncthreads() { block_barrier->arrive_and_wait(); }

inline int atomicAdd(int* place, int value) { return __atomic_fetch_add(place, value, __ATOMIC_RELAXED); }

using __half = _Float16;
inline __half __float2half(float value) { return static_cast<__half>(value); }
inline float __half2float(__half value) { return static_cast<float>(value); }

template <typename... Types, std::size_t... Places>
void run(void (*kernel)(Types...), void** arguments, std::index_sequence<Places...>) {
    kernel(*static_cast<Types*>(arguments[Places])...);
}

// As cuLaunchKernel: each of `arguments` points to the value of one parameter of the kernel.
template <typename... Types>
void launch(void (*kernel)(Types...), unsigned grid_x, unsigned grid_y, unsigned block, void** arguments) {
    std::barrier<> barrier(block);
    block_barrier = &barrier;
    gridDim = {grid_x, grid_y, 1};
    blockDim = {block, 1, 1};
    std::vector<std::jthread> threads;
    for (unsigned thread = 0; thread < block; ++thread)
        threads.emplace_back([=] {
            threadIdx = {thread, 0, 0};
            for (unsigned y = 0; y < grid_y; ++y)
                for (unsigned x = 0; x < grid_x; ++x) {
                    blockIdx = {x, y, 0};
                    run(kernel, arguments, std::index_sequence_for<Types...>{});
                    __syncthreads();  // the next block writes what this one reads
                }
        });
}

// What ctypes calls: launch_<kernel>(grid_x, grid_y, block, arguments).
#define LAUNCHER(kernel)                                                                                \
    extern "C" void launch_##kernel(unsigned grid_x, unsigned grid_y, unsigned block, void** arguments) \
    {                                                                                                   \
        launch(kernel, grid_x, grid_y, block, arguments);                                               \
    }
