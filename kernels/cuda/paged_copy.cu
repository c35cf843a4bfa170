// Slabs between contiguous staging memory, as they are read from disk, and a paged pool.
//
//   staging   [num_slabs] slabs of slab_bytes, slab_stride apart
//   pool      [num_pool_blocks, 2, heads, tokens, dim] of one layer: a slab a block, contiguous
//
// A thread block copies one chunk of one slab, 16 bytes a thread and step: the bandwidth of memory.

typedef unsigned char u8;
typedef unsigned int u32;
typedef unsigned long long u64;

// A chunk: what one thread block copies.
#define UCM_CHUNK_BYTES 32768ULL

__device__ __forceinline__ void copy_chunk(u8 *to, const u8 *from, u64 num_bytes)
{
    for (u64 at = threadIdx.x * 16ULL; at + 16 <= num_bytes; at += blockDim.x * 16ULL)
        *(uint4 *)(to + at) = *(const uint4 *)(from + at);
}

// Where the chunk of this thread block lies: its slab, its offset in the slab, its length.
struct Chunk {
    u64 slab, offset, num_bytes;
};

__device__ __forceinline__ Chunk own_chunk(u64 slab_bytes)
{
    u64 chunks_a_slab = (slab_bytes + UCM_CHUNK_BYTES - 1) / UCM_CHUNK_BYTES;
    u64 offset = blockIdx.x % chunks_a_slab * UCM_CHUNK_BYTES, left = slab_bytes - offset;
    return Chunk{blockIdx.x / chunks_a_slab, offset,
                 left < UCM_CHUNK_BYTES ? left : UCM_CHUNK_BYTES};
}

// pool[block_ids[i]] = staging[i].
//
// All addresses, slab_bytes and slab_stride are multiples of 16; block_ids are unique and inside
// the pool. Launch num_slabs * ceil(slab_bytes / 32 KiB) thread blocks.
extern "C" __global__ void ucm_scatter_slabs(const u8 *staging, u64 slab_stride, u8 *pool,
                                             u64 slab_bytes, const u32 *block_ids)
{
    Chunk own = own_chunk(slab_bytes);
    copy_chunk(pool + block_ids[own.slab] * slab_bytes + own.offset,
               staging + own.slab * slab_stride + own.offset, own.num_bytes);
}

// staging[i] = pool[block_ids[i]]; the padding between slabs is left alone. As above.
extern "C" __global__ void ucm_gather_slabs(u8 *staging, u64 slab_stride, const u8 *pool,
                                            u64 slab_bytes, const u32 *block_ids)
{
    Chunk own = own_chunk(slab_bytes);
    copy_chunk(staging + own.slab * slab_stride + own.offset,
               pool + block_ids[own.slab] * slab_bytes + own.offset, own.num_bytes);
}
