// Checksums of slabs: xxh3_64 of each, one warp a slab. The layout of the work is in xxh3.cuh.
//
// Per 1 KiB a lane does two 16-byte loads, four multiply-adds, three steps of a butterfly over the
// eight lanes that hold the same accumulators, and one scramble, which all eight do alike. Only the
// scramble waits for the block before; loads run one block ahead.
#include "xxh3.cuh"

#define UCM_WARP_LANES 32
#define UCM_ALL_LANES 0xFFFFFFFFu

// Sixteen bytes from an address that is a multiple of 16.
__device__ __forceinline__ Xxh3Words load_words(const u8 *from)
{
    ulonglong2 words = *(const ulonglong2 *)from;
    return Xxh3Words{words.x, words.y};
}

// The sum over the lanes that differ in bits 2, 3 and 4: those with the same accumulators.
__device__ __forceinline__ void add_over_stripes(Xxh3Pair &sum)
{
    for (int step = 4; step < UCM_WARP_LANES; step *= 2) {
        sum.first += __shfl_xor_sync(UCM_ALL_LANES, sum.first, step);
        sum.second += __shfl_xor_sync(UCM_ALL_LANES, sum.second, step);
    }
}

// What is behind the scrambled blocks: whole stripes, then the last 64 bytes, read once more.
__device__ __forceinline__ Xxh3Pair tail_sum(const u8 *data, u64 length, u32 lane)
{
    u32 pair = lane % 4, stripe = lane / 4, num_stripes = xxh3_num_tail_stripes(length);
    const u8 *tail = data + xxh3_num_scrambled(length) * XXH3_BLOCK_BYTES;
    Xxh3Pair sum = {0, 0};
    for (u32 i = stripe; i < num_stripes; i += 8)
        xxh3_accumulate(sum, load_words(tail + i * XXH3_STRIPE_BYTES + 16 * pair),
                        XXH3_STRIPE_KEYS(i, pair));
    if (stripe == 0) {
        const u8 *last = data + length - XXH3_STRIPE_BYTES + 16 * pair;  // anywhere
        xxh3_accumulate(sum, Xxh3Words{xxh3_read(last, 8), xxh3_read(last + 8, 8)},
                        XXH3_LAST_STRIPE_KEYS(pair));
    }
    return sum;
}

__device__ __forceinline__ u64 warp_xxh3(const u8 *data, u64 length, u32 lane)
{
    if (length <= XXH3_MAX_SHORT_BYTES)
        return xxh3_up_to_240(data, length);
    u32 pair = lane % 4, stripe = lane / 4;
    Xxh3Words near_keys = XXH3_STRIPE_KEYS(stripe, pair);
    Xxh3Words far_keys = XXH3_STRIPE_KEYS(stripe + 8, pair);
    Xxh3Words scramble_keys = XXH3_SCRAMBLE_KEYS(pair);
    Xxh3Pair total = xxh3_initial(pair);
    u64 num_blocks = xxh3_num_scrambled(length);
    const u8 *from = data + stripe * XXH3_STRIPE_BYTES + 16 * pair;
    Xxh3Words near_words = {0, 0}, far_words = {0, 0};
    if (num_blocks > 0) {
        near_words = load_words(from);
        far_words = load_words(from + XXH3_BLOCK_BYTES / 2);
    }
    for (u64 block = 0; block < num_blocks; ++block) {
        Xxh3Pair sum = {0, 0};
        xxh3_accumulate(sum, near_words, near_keys);
        xxh3_accumulate(sum, far_words, far_keys);
        from += XXH3_BLOCK_BYTES;
        if (block + 1 < num_blocks) {
            near_words = load_words(from);
            far_words = load_words(from + XXH3_BLOCK_BYTES / 2);
        }
        add_over_stripes(sum);
        total.first += sum.first;
        total.second += sum.second;
        xxh3_scramble(total, scramble_keys);
    }
    Xxh3Pair sum = tail_sum(data, length, lane);
    add_over_stripes(sum);
    u64 hash = xxh3_merge(Xxh3Pair{total.first + sum.first, total.second + sum.second}, pair);
    hash += __shfl_xor_sync(UCM_ALL_LANES, hash, 1);
    hash += __shfl_xor_sync(UCM_ALL_LANES, hash, 2);
    return xxh3_avalanche(hash + length * XXH_PRIME64_1);
}

// sums[i] = xxh3_64 of the slab_bytes at base + offsets[i].
//
// base and offsets are multiples of 16. Launch at least 32 * num_slabs threads, in blocks of a
// multiple of 32.
extern "C" __global__ void ucm_slab_checksums(const u8 *base, const u64 *offsets, u64 slab_bytes,
                                              u32 num_slabs, u64 *sums)
{
    u32 thread = blockIdx.x * blockDim.x + threadIdx.x;
    u32 slab = thread / UCM_WARP_LANES, lane = thread % UCM_WARP_LANES;
    if (slab >= num_slabs)
        return;  // the whole warp
    u64 sum = warp_xxh3(base + offsets[slab], slab_bytes, lane);
    if (lane == 0)
        sums[slab] = sum;
}
