// act(gate) * up, or act(up), with biases added before, in one pass: rows of values in, rows of halves out.
//
// A thread has eight neighbouring columns of a row; grid (rows, blocks of a row). Rows may be parts of longer ones.

// Eight values, with their bias.
template <bool HALF> __device__ __forceinline__ void eight(float (&v)[8], const u16* from, const u16* bias) {
    const uint4 found = *(const uint4*)from;
    const u32 words[4] = {found.x, found.y, found.z, found.w};
    uint4 more = make_uint4(0, 0, 0, 0);
    if (bias) more = *(const uint4*)bias;
    const u32 biases[4] = {more.x, more.y, more.z, more.w};
#pragma unroll
    for (int i = 0; i < 8; ++i) {
        v[i] = value_of<HALF>(words[i / 2] >> (16 * (i & 1)) & 0xFFFF);
        if (bias) v[i] += value_of<HALF>(biases[i / 2] >> (16 * (i & 1)) & 0xFFFF);
    }
}

template <int ACT, bool GATED, bool HALF>
__global__ void __launch_bounds__(256) activation(
    const u16* up, const u16* gate, const u16* up_bias, const u16* gate_bias, u16* out, int columns, int up_stride, int gate_stride, int out_stride
) {
    const int column = (blockIdx.y * 256 + threadIdx.x) * 8;
    if (column >= columns) return;
    const long row = blockIdx.x;
    float u[8], g[8];
    eight<HALF>(u, up + row * up_stride + column, up_bias ? up_bias + column : nullptr);
    if constexpr (GATED) eight<HALF>(g, gate + row * gate_stride + column, gate_bias ? gate_bias + column : nullptr);
    u32 words[4];
#pragma unroll
    for (int i = 0; i < 8; i += 2) {
        float first, second;
        if constexpr (GATED) {
            first = activated<ACT>(g[i]) * u[i];
            second = activated<ACT>(g[i + 1]) * u[i + 1];
        } else {
            first = activated<ACT>(u[i]);
            second = activated<ACT>(u[i + 1]);
        }
        words[i / 2] = bits_of<HALF>(first) | (u32)bits_of<HALF>(second) << 16;
    }
    *(uint4*)(out + row * out_stride + column) = make_uint4(words[0], words[1], words[2], words[3]);
}
