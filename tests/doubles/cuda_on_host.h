// Enough of CUDA C++ to compile a kernel's own source with g++ and run it on the CPU.
//
// Runs on a double of the GPU: proves our code, not NVIDIA's. Each thread of a warp is a fiber
// (ucontext); a warp's fibers take turns at every shuffle, so that lanes exchange values as the
// hardware's do. Warps run one after another: kernels that meet in __syncthreads are not supported.
// A shuffle that not all 32 lanes reach, which hangs or corrupts on a GPU, ends the process.
#pragma once

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <ucontext.h>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline

struct alignas(16) ulonglong2 {
    unsigned long long x, y;
};
struct alignas(16) uint4 {
    unsigned int x, y, z, w;
};
struct Dim {
    unsigned int x;
};
static Dim threadIdx, blockIdx, blockDim, gridDim;

namespace on_host {

constexpr unsigned LANES = 32;
constexpr size_t STACK_BYTES = 64 << 10;

struct Lane {
    ucontext_t context;
    std::vector<char> stack = std::vector<char>(STACK_BYTES);
    bool has_ended = false;
    unsigned num_shuffles = 0;
    unsigned long long given[2];  // by parity of the shuffle: a slow lane still reads the last one
};

static Lane lanes[LANES];
static ucontext_t scheduler;
static unsigned current;
static std::function<void()> body;

[[noreturn]] inline void fail(const char *what)
{
    fprintf(stderr, "cuda_on_host: %s\n", what);
    abort();
}

inline void run_lane()
{
    body();
    lanes[current].has_ended = true;
    swapcontext(&lanes[current].context, &scheduler);
}

// Let the other lanes come as far as this one is.
inline void wait_for_warp() { swapcontext(&lanes[current].context, &scheduler); }

inline unsigned long long exchange(unsigned long long value, unsigned other)
{
    Lane &own = lanes[current];
    unsigned turn = own.num_shuffles++;
    own.given[turn % 2] = value;
    wait_for_warp();
    if (lanes[other].num_shuffles < turn + 1)
        fail("a shuffle that not every lane of the warp reaches");
    return lanes[other].given[turn % 2];
}

inline void run_warp(unsigned first_thread)
{
    for (unsigned lane = 0; lane < LANES; ++lane) {
        Lane &own = lanes[lane];
        own.has_ended = false;
        own.num_shuffles = 0;
        getcontext(&own.context);
        own.context.uc_stack = {own.stack.data(), 0, own.stack.size()};
        own.context.uc_link = nullptr;
        makecontext(&own.context, run_lane, 0);
    }
    for (bool busy = true; busy;) {
        busy = false;
        for (current = 0; current < LANES; ++current) {
            if (lanes[current].has_ended)
                continue;
            threadIdx.x = first_thread + current;
            swapcontext(&scheduler, &lanes[current].context);
            busy = busy || !lanes[current].has_ended;
        }
    }
    for (unsigned lane = 1; lane < LANES; ++lane)
        if (lanes[lane].num_shuffles != lanes[0].num_shuffles)
            fail("lanes of one warp shuffled a different number of times");
}

// Run a grid of one dimension, one thread block after another.
inline void launch(unsigned grid, unsigned block, const std::function<void()> &kernel)
{
    if (block == 0 || block % LANES != 0 || block > 1024)
        fail("a thread block must be whole warps, at most 1024 threads");
    body = kernel;
    gridDim.x = grid;
    blockDim.x = block;
    for (blockIdx.x = 0; blockIdx.x < grid; ++blockIdx.x)
        for (unsigned thread = 0; thread < block; thread += LANES)
            run_warp(thread);
}

}  // namespace on_host

inline unsigned long long __shfl_xor_sync(unsigned mask, unsigned long long value, int lane_mask)
{
    if (mask != 0xFFFFFFFFu)
        on_host::fail("only shuffles of a whole warp are supported");
    return on_host::exchange(value, on_host::current ^ (unsigned)lane_mask);
}
