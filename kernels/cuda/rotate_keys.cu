// Keys at other positions: every plane of every row is turned by the same angle as in all others.
//
//   source, target   [num_rows, head_dim], contiguous; may be the same memory
//   table            [2, head_dim / 2] fp32: cosines, sines
//   planes           (j, j + head_dim / 2), or (2 j, 2 j + 1) when interleaved
//
// A thread turns one plane of one row, in fp32, and rounds once: the bandwidth of memory.

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;

struct Plane {
    u64 first, second;
    u32 number;
};

// Plane `index` of the whole, counted row by row.
__device__ __forceinline__ Plane plane_of(u64 index, u32 head_dim, bool is_interleaved)
{
    u32 half = head_dim / 2, number = (u32)(index % half);
    u64 row = index / half * head_dim;
    if (is_interleaved)
        return Plane{row + 2 * number, row + 2 * number + 1, number};
    return Plane{row + number, row + number + half, number};
}

__device__ __forceinline__ float load(const float *from) { return *from; }

__device__ __forceinline__ void store(float *to, float value) { *to = value; }

__device__ __forceinline__ float load(const u16 *from)
{
    union {
        u32 bits;
        float value;
    } wide;
    wide.bits = (u32)*from << 16;
    return wide.value;
}

// To the nearest, ties to even; NaN stays NaN.
__device__ __forceinline__ void store(u16 *to, float value)
{
    union {
        float value;
        u32 bits;
    } wide;
    wide.value = value;
    if (value != value)
        *to = (u16)((wide.bits >> 16) | 0x40);
    else
        *to = (u16)((wide.bits + 0x7FFFu + ((wide.bits >> 16) & 1u)) >> 16);
}

template <typename T>
__device__ __forceinline__ void rotate_own_plane(T *target, const T *source, const float *table,
                                                 u64 num_rows, u64 shape)
{
    u32 head_dim = (u32)shape, half = head_dim / 2;
    u64 index = (u64)blockIdx.x * blockDim.x + threadIdx.x;
    if (index >= num_rows * half)
        return;
    Plane at = plane_of(index, head_dim, (shape >> 32) & 1);
    float a = load(source + at.first), b = load(source + at.second);
    float cosine = table[at.number], sine = table[half + at.number];
    store(target + at.first, a * cosine - b * sine);
    store(target + at.second, b * cosine + a * sine);
}

// shape: head_dim in the low 32 bits; bit 32: interleaved. Launch ceil(num_rows * head_dim / 2 / 256)
// thread blocks of 256.
extern "C" __global__ void ucm_rotate_keys_float32(float *target, const float *source,
                                                   const float *table, u64 num_rows, u64 shape)
{
    rotate_own_plane(target, source, table, num_rows, shape);
}

// As above; bfloat16 as its bits.
extern "C" __global__ void ucm_rotate_keys_bfloat16(u16 *target, const u16 *source,
                                                    const float *table, u64 num_rows, u64 shape)
{
    rotate_own_plane(target, source, table, num_rows, shape);
}
