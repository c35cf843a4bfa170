// XXH3-64 (seed 0, default secret) in the pieces that a warp needs, for CUDA and for plain C++.
//
// Source: xxHash by Y. Collet, https://xxhash.com, specification of XXH3 (doc/xxhash_spec.md).
//
// Above 240 bytes the input is taken in stripes of 64 bytes, each 8 words for 8 accumulators; after
// every 16 stripes (1 KiB, a "block") the accumulators are scrambled. Inside a block the stripes
// only add to the accumulators, in any order: a warp computes them at once.
//
//   lane of the warp        0    1    2    3  |  4    5    6    7  | ...   31
//   stripes of a block      0    0    0    0  |  1    1    1    1  | ...    7   and those + 8
//   words = accumulators   0,1  2,3  4,5  6,7 | 0,1  2,3  4,5  6,7 | ...   6,7
//
// Every function here is also compiled by g++ and compared with the xxhash library in the tests.
#pragma once

#if defined(__CUDACC__) || defined(__CUDACC_RTC__)
#define UCM_SHARED __host__ __device__ __forceinline__
#define UCM_TABLE __constant__
#else
#define UCM_SHARED static inline
#define UCM_TABLE static const
#endif

typedef unsigned char u8;
typedef unsigned int u32;
typedef unsigned long long u64;

#define XXH3_STRIPE_BYTES 64
#define XXH3_BLOCK_STRIPES 16
#define XXH3_BLOCK_BYTES 1024
#define XXH3_MAX_SHORT_BYTES 240

#define XXH_PRIME32_1 0x9E3779B1ULL
#define XXH_PRIME32_2 0x85EBCA77ULL
#define XXH_PRIME32_3 0xC2B2AE3DULL
#define XXH_PRIME64_1 0x9E3779B185EBCA87ULL
#define XXH_PRIME64_2 0xC2B2AE3D27D4EB4FULL
#define XXH_PRIME64_3 0x165667B19E3779F9ULL
#define XXH_PRIME64_4 0x85EBCA77C2B2AE63ULL
#define XXH_PRIME64_5 0x27D4EB2F165667C5ULL

// The default secret, 192 bytes, as little-endian words.
UCM_TABLE u64 XXH3_SECRET[24] = {
    0xBE4BA423396CFEB8ULL, 0x1CAD21F72C81017CULL, 0xDB979083E96DD4DEULL, 0x1F67B3B7A4A44072ULL,
    0x78E5C0CC4EE679CBULL, 0x2172FFCC7DD05A82ULL, 0x8E2443F7744608B8ULL, 0x4C263A81E69035E0ULL,
    0xCB00C391BB52283CULL, 0xA32E531B8B65D088ULL, 0x4EF90DA297486471ULL, 0xD8ACDEA946EF1938ULL,
    0x3F349CE33F76FAA8ULL, 0x1D4F0BC7C7BBDCF9ULL, 0x3159B4CD4BE0518AULL, 0x647378D9C97E9FC8ULL,
    0xC3EBD33483ACC5EAULL, 0xEB6313FAFFA081C5ULL, 0x49DAF0B751DD0D17ULL, 0x9E68D429265516D3ULL,
    0xFCA1477D58BE162BULL, 0xCE31D07AD1B8F88FULL, 0x280416958F3ACB45ULL, 0x7E404BBBCAFBD7AFULL,
};

// Eight bytes of the secret from any offset up to 184.
UCM_SHARED u64 xxh3_secret(u32 offset)
{
    u32 word = offset / 8, shift = (offset % 8) * 8;
    if (shift == 0)
        return XXH3_SECRET[word];
    return (XXH3_SECRET[word] >> shift) | (XXH3_SECRET[word + 1] << (64 - shift));
}

// A little-endian number from any address.
UCM_SHARED u64 xxh3_read(const u8 *from, u32 num_bytes)
{
    u64 value = 0;
    for (u32 i = 0; i < num_bytes; ++i)
        value |= (u64)from[i] << (8 * i);
    return value;
}

UCM_SHARED u64 xxh3_swap(u64 value)
{
    u64 swapped = 0;
    for (u32 i = 0; i < 8; ++i)
        swapped |= ((value >> (8 * i)) & 0xFF) << (56 - 8 * i);
    return swapped;
}

UCM_SHARED u64 xxh3_rotate(u64 value, u32 bits) { return (value << bits) | (value >> (64 - bits)); }

// Low half of the 128-bit product xor its high half.
UCM_SHARED u64 xxh3_fold(u64 a, u64 b)
{
#if defined(__CUDA_ARCH__)
    return (a * b) ^ __umul64hi(a, b);
#elif defined(__CUDACC_RTC__)
    return a * b;  // never run: the compiler's host pass only parses it
#else
    unsigned __int128 product = (unsigned __int128)a * b;
    return (u64)product ^ (u64)(product >> 64);
#endif
}

UCM_SHARED u64 xxh3_avalanche(u64 hash)
{
    hash ^= hash >> 37;
    hash *= 0x165667919E3779F9ULL;
    return hash ^ (hash >> 32);
}

UCM_SHARED u64 xxh64_avalanche(u64 hash)
{
    hash = (hash ^ (hash >> 33)) * XXH_PRIME64_2;
    hash = (hash ^ (hash >> 29)) * XXH_PRIME64_3;
    return hash ^ (hash >> 32);
}

// ------------------------------------------------------------ up to 240 bytes, one thread

UCM_SHARED u64 xxh3_mix(const u8 *data, u32 secret_offset)
{
    return xxh3_fold(xxh3_read(data, 8) ^ xxh3_secret(secret_offset),
                     xxh3_read(data + 8, 8) ^ xxh3_secret(secret_offset + 8));
}

UCM_SHARED u64 xxh3_up_to_16(const u8 *data, u64 length)
{
    if (length > 8) {
        u64 low = xxh3_read(data, 8) ^ xxh3_secret(24) ^ xxh3_secret(32);
        u64 high = xxh3_read(data + length - 8, 8) ^ xxh3_secret(40) ^ xxh3_secret(48);
        return xxh3_avalanche(length + xxh3_swap(low) + high + xxh3_fold(low, high));
    }
    if (length >= 4) {
        u64 words = xxh3_read(data + length - 4, 4) + (xxh3_read(data, 4) << 32);
        u64 hash = words ^ xxh3_secret(8) ^ xxh3_secret(16);
        hash ^= xxh3_rotate(hash, 49) ^ xxh3_rotate(hash, 24);
        hash *= 0x9FB21C651E98DF25ULL;
        hash ^= (hash >> 35) + length;
        hash *= 0x9FB21C651E98DF25ULL;
        return hash ^ (hash >> 28);
    }
    if (length > 0) {
        u64 bytes = ((u64)data[0] << 16) | ((u64)data[length >> 1] << 24) | data[length - 1];
        u64 flip = (xxh3_secret(0) ^ (xxh3_secret(0) >> 32)) & 0xFFFFFFFFULL;
        return xxh64_avalanche((bytes | (length << 8)) ^ flip);
    }
    return xxh64_avalanche(xxh3_secret(56) ^ xxh3_secret(64));
}

UCM_SHARED u64 xxh3_up_to_240(const u8 *data, u64 length)
{
    u64 sum = length * XXH_PRIME64_1;
    if (length <= 16)
        return xxh3_up_to_16(data, length);
    if (length <= 128) {
        for (u32 i = 0; i < (length + 31) / 32; ++i) {
            sum += xxh3_mix(data + 16 * i, 32 * i);
            sum += xxh3_mix(data + length - 16 * (i + 1), 32 * i + 16);
        }
        return xxh3_avalanche(sum);
    }
    for (u32 i = 0; i < 8; ++i)
        sum += xxh3_mix(data + 16 * i, 16 * i);
    sum = xxh3_avalanche(sum);
    for (u32 i = 8; i < length / 16; ++i)
        sum += xxh3_mix(data + 16 * i, 16 * (i - 8) + 3);
    sum += xxh3_mix(data + length - 16, 136 - 17);
    return xxh3_avalanche(sum);
}

// ------------------------------------------------------------ above 240 bytes, in pairs

// Two neighbouring accumulators, or what is to be added to them.
struct Xxh3Pair {
    u64 first, second;
};

// Two neighbouring words of a stripe.
struct Xxh3Words {
    u64 first, second;
};

// Accumulators 2 * pair and 2 * pair + 1 at the beginning.
UCM_SHARED Xxh3Pair xxh3_initial(u32 pair)
{
    switch (pair) {
    case 0: return Xxh3Pair{XXH_PRIME32_3, XXH_PRIME64_1};
    case 1: return Xxh3Pair{XXH_PRIME64_2, XXH_PRIME64_3};
    case 2: return Xxh3Pair{XXH_PRIME64_4, XXH_PRIME32_2};
    default: return Xxh3Pair{XXH_PRIME64_5, XXH_PRIME32_1};
    }
}

// What a pair's two words of one stripe add to it: each word to its neighbour, and the product of
// the halves of word xor key to its own.
UCM_SHARED void xxh3_accumulate(Xxh3Pair &sum, Xxh3Words words, Xxh3Words keys)
{
    u64 first = words.first ^ keys.first, second = words.second ^ keys.second;
    sum.first += words.second + (first & 0xFFFFFFFFULL) * (first >> 32);
    sum.second += words.first + (second & 0xFFFFFFFFULL) * (second >> 32);
}

UCM_SHARED u64 xxh3_scramble_one(u64 value, u64 key)
{
    return (value ^ (value >> 47) ^ key) * XXH_PRIME32_1;
}

// What ends a block.
UCM_SHARED void xxh3_scramble(Xxh3Pair &sum, Xxh3Words keys)
{
    sum.first = xxh3_scramble_one(sum.first, keys.first);
    sum.second = xxh3_scramble_one(sum.second, keys.second);
}

// Keys of a pair in a stripe whose part of the secret begins at `offset`.
UCM_SHARED Xxh3Words xxh3_keys(u32 offset, u32 pair)
{
    return Xxh3Words{xxh3_secret(offset + 16 * pair), xxh3_secret(offset + 16 * pair + 8)};
}

#define XXH3_STRIPE_KEYS(stripe, pair) xxh3_keys(8 * (stripe), pair)
#define XXH3_SCRAMBLE_KEYS(pair) xxh3_keys(192 - 64, pair)
#define XXH3_LAST_STRIPE_KEYS(pair) xxh3_keys(192 - 64 - 7, pair)

// Blocks that are scrambled: the last one, full or not, is not.
UCM_SHARED u64 xxh3_num_scrambled(u64 length) { return (length - 1) / XXH3_BLOCK_BYTES; }

// Whole stripes behind the scrambled blocks, 0 to 15; the last 64 bytes are one more stripe.
UCM_SHARED u32 xxh3_num_tail_stripes(u64 length)
{
    return (u32)((length - 1) % XXH3_BLOCK_BYTES) / XXH3_STRIPE_BYTES;
}

// What one pair adds to the hash.
UCM_SHARED u64 xxh3_merge(Xxh3Pair sum, u32 pair)
{
    return xxh3_fold(sum.first ^ xxh3_secret(11 + 16 * pair),
                     sum.second ^ xxh3_secret(19 + 16 * pair));
}
