// Our CUDA kernels, compiled from their own sources for the CPU.
//
//   ucm_host_NAME(grid, block, arguments)   the kernel NAME with the arguments of cuLaunchKernel
//   ucm_serial_xxh3                         the same pieces without a warp: a loop over the lanes
//
// Runs on a double of the GPU: proves our code, not NVIDIA's.
#include "cuda_on_host.h"

#include "paged_copy.cu"
#include "rotate_keys.cu"
#include "slab_checksum.cu"

template <typename T> static T argument(void **arguments, int index)
{
    T value;
    memcpy(&value, arguments[index], sizeof value);
    return value;
}

extern "C" void ucm_host_ucm_slab_checksums(unsigned grid, unsigned block, void **arguments)
{
    on_host::launch(grid, block, [=] {
        ucm_slab_checksums(argument<const u8 *>(arguments, 0), argument<const u64 *>(arguments, 1),
                           argument<u64>(arguments, 2), argument<u32>(arguments, 3),
                           argument<u64 *>(arguments, 4));
    });
}

extern "C" void ucm_host_ucm_scatter_slabs(unsigned grid, unsigned block, void **arguments)
{
    on_host::launch(grid, block, [=] {
        ucm_scatter_slabs(argument<const u8 *>(arguments, 0), argument<u64>(arguments, 1),
                          argument<u8 *>(arguments, 2), argument<u64>(arguments, 3),
                          argument<const u32 *>(arguments, 4));
    });
}

extern "C" void ucm_host_ucm_gather_slabs(unsigned grid, unsigned block, void **arguments)
{
    on_host::launch(grid, block, [=] {
        ucm_gather_slabs(argument<u8 *>(arguments, 0), argument<u64>(arguments, 1),
                         argument<const u8 *>(arguments, 2), argument<u64>(arguments, 3),
                         argument<const u32 *>(arguments, 4));
    });
}

extern "C" void ucm_host_ucm_rotate_keys_float32(unsigned grid, unsigned block, void **arguments)
{
    on_host::launch(grid, block, [=] {
        ucm_rotate_keys_float32(argument<float *>(arguments, 0),
                                argument<const float *>(arguments, 1),
                                argument<const float *>(arguments, 2), argument<u64>(arguments, 3),
                                argument<u64>(arguments, 4));
    });
}

extern "C" void ucm_host_ucm_rotate_keys_bfloat16(unsigned grid, unsigned block, void **arguments)
{
    on_host::launch(grid, block, [=] {
        ucm_rotate_keys_bfloat16(argument<u16 *>(arguments, 0), argument<const u16 *>(arguments, 1),
                                 argument<const float *>(arguments, 2), argument<u64>(arguments, 3),
                                 argument<u64>(arguments, 4));
    });
}

// Parameters of each kernel above: what a launch that is put off has to keep.
extern "C" const unsigned ucm_host_num_parameters = 5;

// Adds the words of one stripe to all accumulators.
static void add_stripe(Xxh3Pair *sums, const u8 *stripe, u32 secret_offset)
{
    for (u32 pair = 0; pair < 4; ++pair) {
        const u8 *words = stripe + 16 * pair;
        xxh3_accumulate(sums[pair], Xxh3Words{xxh3_read(words, 8), xxh3_read(words + 8, 8)},
                        xxh3_keys(secret_offset, pair));
    }
}

extern "C" u64 ucm_serial_xxh3(const u8 *data, u64 length)
{
    if (length <= XXH3_MAX_SHORT_BYTES)
        return xxh3_up_to_240(data, length);
    Xxh3Pair sums[4] = {xxh3_initial(0), xxh3_initial(1), xxh3_initial(2), xxh3_initial(3)};
    const u8 *at = data;
    for (u64 block = 0; block < xxh3_num_scrambled(length); ++block) {
        for (u32 stripe = 0; stripe < XXH3_BLOCK_STRIPES; ++stripe, at += XXH3_STRIPE_BYTES)
            add_stripe(sums, at, 8 * stripe);
        for (u32 pair = 0; pair < 4; ++pair)
            xxh3_scramble(sums[pair], XXH3_SCRAMBLE_KEYS(pair));
    }
    for (u32 stripe = 0; stripe < xxh3_num_tail_stripes(length); ++stripe, at += XXH3_STRIPE_BYTES)
        add_stripe(sums, at, 8 * stripe);
    add_stripe(sums, data + length - XXH3_STRIPE_BYTES, 192 - 64 - 7);
    u64 hash = length * XXH_PRIME64_1;
    for (u32 pair = 0; pair < 4; ++pair)
        hash += xxh3_merge(sums[pair], pair);
    return xxh3_avalanche(hash);
}
