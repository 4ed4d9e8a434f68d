// Rows rounded to float8 (e4m3) with a scale each, at which the largest value of the row becomes 448; optionally of
// act(gate) * up, so that the hidden activations of an FFN are never written in half precision.
//
// One block a row, which it reads twice: the second time from the cache.

// Four values of the row from column; inputs of a gated FFN are [up | gate], each of `columns`.
template <int ACT, bool GATED, bool HALF>
__device__ __forceinline__ void four(float (&v)[4], const u16* row, const u16* up_bias, const u16* gate_bias, int column, int columns) {
    const uint2 up = *(const uint2*)(row + column);
    const u32 words[2] = {up.x, up.y};
    uint2 gate = make_uint2(0, 0);
    if constexpr (GATED) gate = *(const uint2*)(row + columns + column);
    const u32 gates[2] = {gate.x, gate.y};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        float u = value_of<HALF>(words[i / 2] >> (16 * (i & 1)) & 0xFFFF);
        if (up_bias) u += value_of<HALF>(up_bias[column + i]);
        if constexpr (GATED) {
            float g = value_of<HALF>(gates[i / 2] >> (16 * (i & 1)) & 0xFFFF);
            if (gate_bias) g += value_of<HALF>(gate_bias[column + i]);
            v[i] = activated<ACT>(g) * u;
        } else {
            v[i] = activated<ACT>(u);
        }
    }
}

// out [rows, columns] float8 and scale [rows] of x [rows, columns], or [rows, 2 columns] if gated; columns % 4 == 0.
template <int ACT, bool GATED, bool HALF>
__global__ void __launch_bounds__(512) float8_rows(const u16* x, u8* out, float* scale, const u16* up_bias, const u16* gate_bias, int columns) {
    __shared__ float largest[16];
    const u16* row = x + (long)blockIdx.x * columns * (GATED ? 2 : 1);
    float most = 0.f, v[4];
    for (int column = threadIdx.x * 4; column < columns; column += 2048) {
        four<ACT, GATED, HALF>(v, row, up_bias, gate_bias, column, columns);
#pragma unroll
        for (int i = 0; i < 4; ++i) most = fmaxf(most, fabsf(v[i]));
    }
#pragma unroll
    for (int apart = 16; apart; apart >>= 1) most = fmaxf(most, __shfl_xor_sync(0xFFFFFFFFu, most, apart));
    if ((threadIdx.x & 31) == 0) largest[threadIdx.x >> 5] = most;
    __syncthreads();
#pragma unroll
    for (int w = 0; w < 16; ++w) most = fmaxf(most, largest[w]);
    // No smaller than the smallest normal number: the inverse of what is below has no float32.
    const float step = most == 0.f ? 1.f : fmaxf(most / 448.f, 1.17549435e-38f), inverse = 1.f / step;
    if (threadIdx.x == 0) scale[blockIdx.x] = step;
    for (int column = threadIdx.x * 4; column < columns; column += 2048) {
        four<ACT, GATED, HALF>(v, row, up_bias, gate_bias, column, columns);
        u16 low, high;
        asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(low) : "f"(v[1] * inverse), "f"(v[0] * inverse));
        asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(high) : "f"(v[3] * inverse), "f"(v[2] * inverse));
        *(u32*)(out + (long)blockIdx.x * columns + column) = low | (u32)high << 16;
    }
}
