// The whole FFN over packed low-bit codes in two launches: up, gate and activation; then down.
//
// A warp multiplies 16 rows of a weight matrix with 8 tokens a tensor-core instruction (m16n8k16, weights on the left).
// The order of the inner dimension is free as long as both sides agree on it, and it is chosen such that every thread
// reads its codes straight from the stored layout: of a group of G columns, thread t of a row's four owns columns
// t * G/4 to (t + 1) * G/4 - 1, which lie in 16 consecutive bytes at 4 bits and G = 128. Neither shared memory nor a
// barrier until the warps of a block, which share the groups of the same rows, add up their sums at the end. `inner`
// writes its result in the order in which `outer` reads it.
//
// Codes become exact halves a pair at a time: or-ed into the mantissa of 128 (bfloat16) or 1024 (float16) a code is that
// number plus itself, and one fused multiply-add takes off the offset and the zero. The scale of a group multiplies the
// float32 sum of its products. Heavy and rest branches share a grid.
//
// Layout of codes: ffsplit/ops/packing.py. Scales: the bits of float16 numbers, or bytes in units of a 256th of a float16 per row.

struct Matrix {
    const u8* codes;     // [rows, stride] bytes
    const void* scale;   // [rows, groups] float16 bits, or bytes if unit is given
    const u8* zero;      // one packed row of rows * groups zeros; null: symmetric
    const u16* unit;     // [rows] float16; null: scales are float16
    int rows, columns;
};

template <int BITS> __device__ __forceinline__ long row_bytes(int columns) { return (long)columns * BITS / 8; }

__device__ __forceinline__ u32 permute(u32 a, u32 b, u32 selector) {
    u32 found;
    asm("prmt.b32 %0, %1, %2, %3;" : "=r"(found) : "r"(a), "r"(b), "r"(selector));
    return found;
}

// (a & mask) | magic, one instruction.
__device__ __forceinline__ u32 masked_or(u32 a, u32 mask, u32 magic) {
    u32 found;
    asm("lop3.b32 %0, %1, %2, %3, 0xEA;" : "=r"(found) : "r"(a), "r"(mask), "r"(magic));
    return found;
}

template <bool HALF> struct Magic {
    static constexpr u32 ORIGIN = HALF ? 0x64006400u : 0x43004300u;  // 1024 or 128, twice
    static constexpr u32 MINUS = HALF ? 0xE400E400u : 0xC300C300u;
    static constexpr u32 ONE = HALF ? 0x3C003C00u : 0x3F803F80u;
};

// value - (origin + zero), exact.
template <bool HALF> __device__ __forceinline__ u32 shifted(u32 value, u32 offset) {
    u32 found;
    if (HALF) asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(found) : "r"(value), "r"(Magic<true>::ONE), "r"(offset));
    else asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(found) : "r"(value), "r"(Magic<false>::ONE), "r"(offset));
    return found;
}

template <bool HALF> __device__ __forceinline__ void multiply(float (&sum)[4], const u32 (&a)[4], u32 b0, u32 b1) {
    if (HALF)
        asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
            : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
    else
        asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
            : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// Weights are read once: they leave the first-level cache to the tokens.
__device__ __forceinline__ uint4 stream4(const u8* p) {
    uint4 v;
    asm volatile("ld.global.nc.L1::no_allocate.L2::128B.v4.u32 {%0,%1,%2,%3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(p));
    return v;
}
__device__ __forceinline__ uint2 stream2(const u8* p) {
    uint2 v;
    asm volatile("ld.global.nc.L1::no_allocate.v2.u32 {%0,%1}, [%2];" : "=r"(v.x), "=r"(v.y) : "l"(p));
    return v;
}
__device__ __forceinline__ u32 stream1(const u8* p) {
    u32 v;
    asm volatile("ld.global.nc.L1::no_allocate.u32 %0, [%1];" : "=r"(v) : "l"(p));
    return v;
}

template <int WORDS> __device__ __forceinline__ void stream(u32* raw, const u8* p) {
    if constexpr (WORDS % 4 == 0) {
#pragma unroll
        for (int i = 0; i < WORDS / 4; ++i) {
            uint4 v = stream4(p + 16 * i);
            raw[4 * i] = v.x; raw[4 * i + 1] = v.y; raw[4 * i + 2] = v.z; raw[4 * i + 3] = v.w;
        }
    } else if constexpr (WORDS % 2 == 0) {
        uint2 v = stream2(p);
        raw[0] = v.x; raw[1] = v.y;
    } else {
        raw[0] = stream1(p);
    }
}

// One thread's codes of one row in one group: G / 4 columns.
template <int BITS, int G> struct Codes {
    static constexpr int LOW = G / 4 * (BITS == 3 ? 2 : BITS) / 32;  // words of the first plane
    u32 raw[LOW + (BITS == 3 ? 1 : 0)];

    __device__ __forceinline__ void load(const u8* row, int columns, int column) {
        stream<LOW>(raw, row + (long)column * (BITS == 3 ? 2 : BITS) / 8);
        if constexpr (BITS == 3) {
            const u8* high = row + columns / 4 + column / 8;
            raw[LOW] = G == 128 ? stream1(high) : *(const u16*)high;
        }
    }
};

// The scale (upper half: bits of a float16, or a byte) and the zero (lower half) of one row in one group.
template <int BITS> __device__ __forceinline__ u32 grid_of(const Matrix& m, int row, int group, int groups) {
    if constexpr (BITS == 16) return 0;
    const long index = (long)row * groups + group;
    const u32 step = m.unit ? ((const u8*)m.scale)[index] : ((const u16*)m.scale)[index];
    u32 zero;
    if (!m.zero) zero = 1 << (BITS - 1);
    else if constexpr (BITS == 4) zero = m.zero[index >> 1] >> (4 * (index & 1)) & 15;
    else if constexpr (BITS == 2) zero = m.zero[index >> 2] >> (2 * (index & 3)) & 3;
    else if constexpr (BITS == 3) {
        const long padded = ((long)m.rows * groups + 7) / 8 * 8;
        zero = (m.zero[index >> 2] >> (2 * (index & 3)) & 3) | (m.zero[padded / 4 + (index >> 3)] >> (index & 7) & 1) << 2;
    } else zero = m.zero[index];
    return step << 16 | zero;
}

// Eight decoded weights of one row as pairs (0, 4), (1, 5), (2, 6), (3, 7): the nibbles of a word that one mask finds.
template <int BITS, bool HALF, int G>
__device__ __forceinline__ void decode(u32 (&pairs)[4], const Codes<BITS, G>& codes, int span, int zero) {
    constexpr u32 ORIGIN = Magic<HALF>::ORIGIN;
    const u32* raw = codes.raw;
    const u32 offset = Magic<HALF>::MINUS | zero * 0x00010001u;
    if constexpr (BITS == 16) {
        const u32* v = raw + 4 * span;
        pairs[0] = permute(v[0], v[2], 0x5410); pairs[1] = permute(v[0], v[2], 0x7632);
        pairs[2] = permute(v[1], v[3], 0x5410); pairs[3] = permute(v[1], v[3], 0x7632);
    } else if constexpr (BITS == 8) {
        const u32 low = raw[2 * span], high = raw[2 * span + 1];
#pragma unroll
        for (int p = 0; p < 4; ++p) {
            if constexpr (HALF) {
                const u32 two = permute(low, high, p | (p + 4) << 8);
                pairs[p] = shifted<true>(permute(two, 0x64646464u, 0x4240), offset);
            } else {
                const float base = 8388608.f + zero;  // 2^23 + code is a float32's bits with the code or-ed in
                const float first = __uint_as_float(permute(low, 0x4B000000u, 0x7440 + p)) - base;
                const float second = __uint_as_float(permute(high, 0x4B000000u, 0x7440 + p)) - base;
                asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pairs[p]) : "f"(second), "f"(first));
            }
        }
    } else if constexpr (BITS == 4) {
#pragma unroll
        for (int p = 0; p < 4; ++p) pairs[p] = shifted<HALF>(masked_or(raw[span] >> (4 * p), 0x000F000Fu, ORIGIN), offset);
    } else {
        const u32 spread = permute(raw[span / 2], 0, span % 2 ? 0x4342 : 0x4140);  // a byte of four codes in each half
        u32 third = 0;
        if constexpr (BITS == 3) {
            third = raw[Codes<BITS, G>::LOW] >> (8 * span) & 0xFF;
            third = (third | third << 12) << 2;
        }
#pragma unroll
        for (int p = 0; p < 4; ++p) {
            u32 code = masked_or(spread >> (2 * p), 0x00030003u, ORIGIN);
            if constexpr (BITS == 3) code = masked_or(third >> p, 0x00040004u, code);
            pairs[p] = shifted<HALF>(code, offset);
        }
    }
}

// The same order for eight values of a token.
__device__ __forceinline__ uint4 paired(uint4 v) {
    return make_uint4(permute(v.x, v.z, 0x5410), permute(v.x, v.z, 0x7632), permute(v.y, v.w, 0x5410), permute(v.y, v.w, 0x7632));
}

// Where value k of a token stands among tokens that are arranged as the tensor cores' right operand: by tiles of eight
// tokens, groups, spans of eight columns and lanes, so that a warp reads 512 bytes in a row.
template <int G> __device__ __forceinline__ long arranged(int token, int k, int groups) {
    const int t = k % G / (G / 4), span = k % (G / 4) / 8, j = k % 8;
    const long vector = (((long)(token / 8) * groups + k / G) * (G / 32) + span) * 32 + token % 8 * 4 + t;
    return vector * 8 + j % 4 * 2 + j / 4;
}

// Tokens of one tile and span, paired; x is arranged, or rows of x_stride values.
template <int G, bool ARRANGED>
__device__ __forceinline__ uint4 tokens_of(const u16* x, int tile, int group, int groups, int span, int lane, int x_stride, int tokens, bool inside) {
    if constexpr (ARRANGED) {
        if (!inside) return make_uint4(0, 0, 0, 0);
        return ((const uint4*)x)[(((long)tile * groups + group) * (G / 32) + span) * 32 + lane];
    } else {
        const int token = tile * 8 + (lane >> 2);
        if (!inside || token >= tokens) return make_uint4(0, 0, 0, 0);
        return paired(*(const uint4*)(x + (long)token * x_stride + group * G + (lane & 3) * (G / 4) + span * 8));
    }
}

// Adds the products of MATRICES matrices with the same tokens over the groups first, first + stride, ...
template <int BITS, int G, int MATRICES, int NT, bool HALF, bool ARRANGED>
__device__ __forceinline__ void accumulate(
    float (&sums)[MATRICES][NT][4], const Matrix (&m)[MATRICES], const int (&row)[2], const u16* x, int x_stride, int tokens,
    int first, int stride, int lane
) {
    const int t = lane & 3, columns = m[0].columns, groups = (columns + G - 1) / G;
    const u8* start[MATRICES][2];
    Codes<BITS, G> next[MATRICES][2];
    u32 coming[MATRICES][2];
    // Thread t of a row's four fetches scale and zero of every fourth group that the warp works on.
    const auto fetch = [&](int from) {
        const int group = min(from + t * stride, groups - 1);
#pragma unroll
        for (int k = 0; k < MATRICES; ++k)
#pragma unroll
            for (int i = 0; i < 2; ++i) coming[k][i] = grid_of<BITS>(m[k], row[i], group, groups);
    };
    const auto load = [&](int group) {
        const int column = group * G + t * (G / 4);
        if (column < columns)
#pragma unroll
            for (int k = 0; k < MATRICES; ++k)
#pragma unroll
                for (int i = 0; i < 2; ++i) next[k][i].load(start[k][i], columns, column);
    };
    float unit[MATRICES][2];
#pragma unroll
    for (int k = 0; k < MATRICES; ++k)
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            start[k][i] = m[k].codes + row[i] * row_bytes<BITS>(columns);
            unit[k][i] = BITS != 16 && m[k].unit ? half_value(m[k].unit[row[i]]) / 256.f : 0.f;
        }
    if (first >= groups) return;
    // A thread beyond the columns multiplies tokens of zero by what it loaded last, or by anything if this is its first
    // group: codes are numbers whatever their bits, but halves may be NaN.
    if (BITS == 16 && first == groups - 1)
#pragma unroll
        for (int k = 0; k < MATRICES; ++k)
#pragma unroll
            for (int i = 0; i < 2; ++i) next[k][i] = {};
    load(first);
    fetch(first);
    u32 grid[MATRICES][2];
    for (int group = first, turn = 0; group < groups; group += stride, turn = (turn + 1) & 3) {
        Codes<BITS, G> now[MATRICES][2];
#pragma unroll
        for (int k = 0; k < MATRICES; ++k)
#pragma unroll
            for (int i = 0; i < 2; ++i) now[k][i] = next[k][i];
        if (group + stride < groups) load(group + stride);
        if (BITS != 16 && turn == 0) {
#pragma unroll
            for (int k = 0; k < MATRICES; ++k) { grid[k][0] = coming[k][0]; grid[k][1] = coming[k][1]; }
            if (group + 4 * stride < groups) fetch(group + 4 * stride);
        }
        float step[MATRICES][2];
        int zero[MATRICES][2];
        if constexpr (BITS != 16)
#pragma unroll
            for (int k = 0; k < MATRICES; ++k)
#pragma unroll
                for (int i = 0; i < 2; ++i) {
                    const u32 here = __shfl_sync(0xFFFFFFFFu, grid[k][i], (lane & ~3) | turn);
                    zero[k][i] = here & 0xFFFF;
                    step[k][i] = unit[k][i] != 0.f ? (here >> 16) * unit[k][i] : half_value(here >> 16);
                }
        const bool inside = group * G + t * (G / 4) < columns;
        float found[MATRICES][NT][4] = {};
#pragma unroll
        for (int span = 0; span < G / 32; ++span) {
            u32 a[MATRICES][2][4];
#pragma unroll
            for (int k = 0; k < MATRICES; ++k)
#pragma unroll
                for (int i = 0; i < 2; ++i) decode<BITS, HALF, G>(a[k][i], now[k][i], span, BITS == 16 ? 0 : zero[k][i]);
#pragma unroll
            for (int n = 0; n < NT; ++n) {
                const uint4 b = tokens_of<G, ARRANGED>(x, n, group, groups, span, lane, x_stride, tokens, inside);
#pragma unroll
                for (int k = 0; k < MATRICES; ++k) {
                    const u32 left[4] = {a[k][0][0], a[k][1][0], a[k][0][1], a[k][1][1]};
                    const u32 right[4] = {a[k][0][2], a[k][1][2], a[k][0][3], a[k][1][3]};
                    multiply<HALF>(BITS == 16 ? sums[k][n] : found[k][n], left, b.x, b.y);
                    multiply<HALF>(BITS == 16 ? sums[k][n] : found[k][n], right, b.z, b.w);
                }
            }
        }
        if constexpr (BITS != 16)
#pragma unroll
            for (int k = 0; k < MATRICES; ++k)
#pragma unroll
                for (int n = 0; n < NT; ++n)
#pragma unroll
                    for (int e = 0; e < 4; ++e) sums[k][n][e] += step[k][e >> 1] * found[k][n][e];
    }
}

// Shared memory for the sums of two token tiles at a time.
template <int MATRICES, int WARPS> using Parts = float[WARPS][MATRICES][8][32];

// What the warps of a block found, one element after the other: finish(row of the tile, token, its sums).
template <int MATRICES, int NT, int WARPS, class Finish>
__device__ __forceinline__ void add_up(Parts<MATRICES, WARPS>& parts, float (&sums)[MATRICES][NT][4], Finish finish) {
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
    constexpr int TILES = NT == 1 ? 1 : 2;
#pragma unroll
    for (int from = 0; from < NT; from += TILES) {
        if (from) __syncthreads();
#pragma unroll
        for (int k = 0; k < MATRICES; ++k)
#pragma unroll
            for (int n = 0; n < TILES; ++n)
#pragma unroll
                for (int e = 0; e < 4; ++e) parts[warp][k][n * 4 + e][lane] = sums[k][from + n][e];
        __syncthreads();
        for (int index = threadIdx.x; index < TILES * 4 * 32; index += WARPS * 32) {
            const int place = index >> 5, of = index & 31;
            float total[MATRICES];
#pragma unroll
            for (int k = 0; k < MATRICES; ++k) {
                total[k] = 0.f;
#pragma unroll
                for (int w = 0; w < WARPS; ++w) total[k] += parts[w][k][place][of];
            }
            finish((of >> 2) + 8 * (place >> 1 & 1), (from + (place >> 2)) * 8 + (of & 3) * 2 + (place & 1), total);
        }
    }
}

template <int BITS, int G, int NT, int ACT, bool GATED, bool HALF, int WARPS>
__device__ __forceinline__ void inner_block(
    Parts<GATED ? 2 : 1, WARPS>& parts, const u16* x, u16* h, const Matrix& gate, const Matrix& up, const u16* gate_bias,
    const u16* up_bias, int block, int tokens, int x_stride
) {
    constexpr int MATRICES = GATED ? 2 : 1;
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, first = block * 16, groups = (up.rows + G - 1) / G;
    const int row[2] = {min(first + (lane >> 2), up.rows - 1), min(first + (lane >> 2) + 8, up.rows - 1)};
    float sums[MATRICES][NT][4] = {};
    if constexpr (GATED) {
        const Matrix both[2] = {up, gate};
        accumulate<BITS, G, 2, NT, HALF, false>(sums, both, row, x, x_stride, tokens, warp, WARPS, lane);
    } else {
        const Matrix one[1] = {up};
        accumulate<BITS, G, 1, NT, HALF, false>(sums, one, row, x, x_stride, tokens, warp, WARPS, lane);
    }
    add_up<MATRICES, NT, WARPS>(parts, sums, [&](int r, int token, float (&total)[MATRICES]) {
        const int neuron = first + r;
        if (neuron >= up.rows || token >= tokens) return;
        const float u = total[0] + (up_bias ? value_of<HALF>(up_bias[neuron]) : 0.f);
        float found;
        if constexpr (GATED) found = activated<ACT>(total[1] + (gate_bias ? value_of<HALF>(gate_bias[neuron]) : 0.f)) * u;
        else found = activated<ACT>(u);
        h[arranged<G>(token, neuron, groups)] = bits_of<HALF>(found);
    });
}

// h = act(gate x) * (up x) of both branches, each arranged for `outer`; grid (blocks of 16 neurons, blocks of NT tiles).
template <int HEAVY_BITS, int REST_BITS, int G, int NT, int ACT, bool GATED, bool HALF, int WARPS>
__global__ void __launch_bounds__(WARPS * 32) inner(
    const u16* x, u16* h,
    const u8* hg, const void* hgs, const u8* hgz, const u16* hgu, const u16* hgb,
    const u8* hu, const void* hus, const u8* huz, const u16* huu, const u16* hub,
    const u8* rg, const void* rgs, const u8* rgz, const u16* rgu, const u16* rgb,
    const u8* ru, const void* rus, const u8* ruz, const u16* ruu, const u16* rub,
    int tokens, int heavy, int rest, int d_model
) {
    __shared__ Parts<GATED ? 2 : 1, WARPS> parts;
    const int tile = blockIdx.y * NT, left = tokens - tile * 8, tiles = (tokens + 7) / 8;
    const long heavy_width = (long)(heavy + G - 1) / G * G, rest_width = (long)(rest + G - 1) / G * G;
    x += (long)tile * 8 * d_model;
    const int heavy_blocks = (heavy + 15) / 16, block = blockIdx.x;
    if constexpr (HEAVY_BITS != 0) {
        if (block < heavy_blocks) {
            inner_block<HEAVY_BITS, G, NT, ACT, GATED, HALF, WARPS>(
                parts, x, h + tile * 8 * heavy_width, {hg, hgs, hgz, hgu, heavy, d_model},
                {hu, hus, huz, huu, heavy, d_model}, hgb, hub, block, left, d_model);
            return;
        }
    }
    inner_block<REST_BITS, G, NT, ACT, GATED, HALF, WARPS>(
        parts, x, h + tiles * 8 * heavy_width + tile * 8 * rest_width, {rg, rgs, rgz, rgu, rest, d_model},
        {ru, rus, ruz, ruu, rest, d_model}, rgb, rub, block - heavy_blocks, left, d_model);
}

// y = down h + bias over both branches; grid (blocks of 16 outputs, blocks of NT tiles).
template <int HEAVY_BITS, int REST_BITS, int G, int NT, bool HALF, int WARPS>
__global__ void __launch_bounds__(WARPS * 32) outer(
    const u16* h, u16* y, const u16* bias,
    const u8* hd, const void* hds, const u8* hdz, const u16* hdu,
    const u8* rd, const void* rds, const u8* rdz, const u16* rdu,
    int tokens, int heavy, int rest, int d_model
) {
    __shared__ Parts<1, WARPS> parts;
    const int tile = blockIdx.y * NT, left = tokens - tile * 8, tiles = (tokens + 7) / 8;
    const int heavy_groups = (heavy + G - 1) / G, rest_groups = (rest + G - 1) / G;
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, first = blockIdx.x * 16;
    const int row[2] = {min(first + (lane >> 2), d_model - 1), min(first + (lane >> 2) + 8, d_model - 1)};
    float sums[1][NT][4] = {};
    if constexpr (HEAVY_BITS != 0) {
        const Matrix one[1] = {{hd, hds, hdz, hdu, d_model, heavy}};
        const u16* part = h + (long)tile * 8 * heavy_groups * G;
        accumulate<HEAVY_BITS, G, 1, NT, HALF, true>(sums, one, row, part, 0, left, warp, WARPS, lane);
    }
    // The warps take turns across both branches, so that none has two groups more than another.
    const Matrix one[1] = {{rd, rds, rdz, rdu, d_model, rest}};
    const int turn = (warp + WARPS - heavy_groups % WARPS) % WARPS;
    const u16* part = h + (long)tiles * 8 * heavy_groups * G + (long)tile * 8 * rest_groups * G;
    accumulate<REST_BITS, G, 1, NT, HALF, true>(sums, one, row, part, 0, left, turn, WARPS, lane);
    add_up<1, NT, WARPS>(parts, sums, [&](int r, int token, float (&total)[1]) {
        if (first + r >= d_model || token >= left) return;
        const float found = total[0] + (bias ? value_of<HALF>(bias[first + r]) : 0.f);
        y[(long)(tile * 8 + token) * d_model + first + r] = bits_of<HALF>(found);
    });
}
