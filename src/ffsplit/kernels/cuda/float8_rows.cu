// Float8 (e4m3) rows with a scale each, at which the largest value of the row becomes 448: of inputs, or of act(gate) * up, so that
// the hidden activations of an FFN are never written in half precision. And what is behind a product of such codes: their scales.
//
// A product's inputs are codes, its outputs sums of their products in halves: `given` [rows] and `columns_scale` [columns, of up and
// then gate] make values of them.

// Four values of halves.
template <bool HALF> __device__ __forceinline__ void four(float (&v)[4], uint2 found) {
    v[0] = value_of<HALF>(found.x & 0xFFFF);
    v[1] = value_of<HALF>(found.x >> 16);
    v[2] = value_of<HALF>(found.y & 0xFFFF);
    v[3] = value_of<HALF>(found.y >> 16);
}

// Sums to values, if they are sums, and a bias.
template <bool HALF, bool SUMS> __device__ __forceinline__ void valued(float (&v)[4], float of_row, const float* of_column, const u16* bias) {
    if (SUMS) {
        const float4 scale = *(const float4*)of_column;
        v[0] *= of_row * scale.x;
        v[1] *= of_row * scale.y;
        v[2] *= of_row * scale.z;
        v[3] *= of_row * scale.w;
    }
    if (bias) {
        float more[4];
        four<HALF>(more, *(const uint2*)bias);
#pragma unroll
        for (int i = 0; i < 4; ++i) v[i] += more[i];
    }
}

// out [rows, columns] float8 and scale [rows] of x [rows, columns], or [rows, 2 columns] if gated; columns % 4 == 0. One block a row of
// STEPS times 2048 columns at most, which it has in registers (of the widest gated rows not all find room there) and asks for before
// any of it is used.
template <int ACT, bool GATED, bool HALF, bool SUMS, int STEPS>
__global__ void __launch_bounds__(512) float8_rows(
    const u16* x, const float* given, const float* column_scale, u8* out, float* scale, const u16* up_bias, const u16* gate_bias, int columns
) {
    __shared__ float largest[16];
    const u16* row = x + (long)blockIdx.x * columns * (GATED ? 2 : 1);
    const float of_row = SUMS ? given[blockIdx.x] : 1.f;
    uint2 ups[STEPS], gates[STEPS];
#pragma unroll
    for (int step = 0; step < STEPS; ++step) {
        const int column = threadIdx.x * 4 + step * 2048;
        ups[step] = gates[step] = make_uint2(0, 0);
        if (column < columns) ups[step] = *(const uint2*)(row + column);
        if (GATED && column < columns) gates[step] = *(const uint2*)(row + columns + column);
    }
    float v[STEPS][4], most = 0.f;
#pragma unroll
    for (int step = 0; step < STEPS; ++step) {
        const int column = threadIdx.x * 4 + step * 2048;
        four<HALF>(v[step], ups[step]);
        if (column >= columns) continue;
        valued<HALF, SUMS>(v[step], of_row, column_scale + column, up_bias ? up_bias + column : nullptr);
        if constexpr (GATED) {
            float g[4];
            four<HALF>(g, gates[step]);
            valued<HALF, SUMS>(g, of_row, column_scale + columns + column, gate_bias ? gate_bias + column : nullptr);
#pragma unroll
            for (int i = 0; i < 4; ++i) v[step][i] *= activated<ACT>(g[i]);
        } else {
#pragma unroll
            for (int i = 0; i < 4; ++i) v[step][i] = activated<ACT>(v[step][i]);
        }
#pragma unroll
        for (int i = 0; i < 4; ++i) most = fmaxf(most, fabsf(v[step][i]));
    }
#pragma unroll
    for (int apart = 16; apart; apart >>= 1) most = fmaxf(most, __shfl_xor_sync(0xFFFFFFFFu, most, apart));
    if ((threadIdx.x & 31) == 0) largest[threadIdx.x >> 5] = most;
    __syncthreads();
#pragma unroll
    for (int w = 0; w < 16; ++w) most = fmaxf(most, largest[w]);
    // No smaller than the smallest normal number: the inverse of what is below has no float32.
    const float one = most == 0.f ? 1.f : fmaxf(most / 448.f, 1.17549435e-38f), inverse = 1.f / one;
    if (threadIdx.x == 0) scale[blockIdx.x] = one;
#pragma unroll
    for (int step = 0; step < STEPS; ++step) {
        const int column = threadIdx.x * 4 + step * 2048;
        if (column >= columns) continue;
        u16 low, high;
        asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(low) : "f"(v[step][1] * inverse), "f"(v[step][0] * inverse));
        asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(high) : "f"(v[step][3] * inverse), "f"(v[step][2] * inverse));
        *(u32*)(out + (long)blockIdx.x * columns + column) = low | (u32)high << 16;
    }
}

// Sums to values in their place, with a bias; grid (rows, blocks of 1024 columns), columns % 4 == 0.
template <bool HALF>
__global__ void __launch_bounds__(256) float8_values(u16* sums, const float* given, const float* column_scale, const u16* bias, int columns) {
    const int column = (blockIdx.y * 256 + threadIdx.x) * 4;
    if (column >= columns) return;
    u16* place = sums + (long)blockIdx.x * columns + column;
    float v[4];
    four<HALF>(v, *(const uint2*)place);
    valued<HALF, true>(v, given[blockIdx.x], column_scale + column, bias ? bias + column : nullptr);
    *(uint2*)place = make_uint2(bits_of<HALF>(v[0]) | (u32)bits_of<HALF>(v[1]) << 16, bits_of<HALF>(v[2]) | (u32)bits_of<HALF>(v[3]) << 16);
}
