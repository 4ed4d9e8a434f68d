// An FFN of few tokens that leaves out the neurons whose activation is small, in two launches.
//
// `inner`: a warp a neuron. It multiplies the neuron's row of `gate` (of `up` without one) by the tokens, activates, and
// reads the row of `up` only if some token's activation is above the threshold. What it computes is rounded wherever the
// plain path rounds, so that the same neurons are left out.
// `outer`: a block of threads takes 256 columns and a share of the neurons, lists those that work for some token, and adds
// up their rows of `down`, which must lie neuron after neuron. The block that comes last to its columns adds up what the
// others found. Lists and sums have one order, so results are the same from run to run.

enum { WARPS = 8, THREADS = 32 * WARPS, STEP = 8, COLUMNS = 32 * STEP, RUN = 8, ROUNDS = 4, LISTED = ROUNDS * THREADS };

// Sixteen bytes of weights, which are read once and leave the first-level cache to the tokens; zeros if not wanted.
__device__ __forceinline__ uint4 stream_if(const u16* p, bool wanted) {
    uint4 v;
    asm volatile(
        "{.reg .pred wanted; setp.ne.u32 wanted, %5, 0; mov.u32 %0, 0; mov.u32 %1, 0; mov.u32 %2, 0; mov.u32 %3, 0;"
        " @wanted ld.global.nc.L1::no_allocate.L2::256B.v4.u32 {%0,%1,%2,%3}, [%4];}"
        : "=&r"(v.x), "=&r"(v.y), "=&r"(v.z), "=&r"(v.w) : "l"(p), "r"((u32)wanted));
    return v;
}

// Sixteen bytes of tokens; zeros if not wanted.
__device__ __forceinline__ uint4 load_if(const u16* p, bool wanted) {
    uint4 v;
    asm volatile(
        "{.reg .pred wanted; setp.ne.u32 wanted, %5, 0; mov.u32 %0, 0; mov.u32 %1, 0; mov.u32 %2, 0; mov.u32 %3, 0;"
        " @wanted ld.global.nc.v4.u32 {%0,%1,%2,%3}, [%4];}"
        : "=&r"(v.x), "=&r"(v.y), "=&r"(v.z), "=&r"(v.w) : "l"(p), "r"((u32)wanted));
    return v;
}

// Past the first-level cache, where other blocks' results are not seen.
__device__ __forceinline__ float fresh(const float* p) {
    float value;
    asm volatile("ld.global.cg.f32 %0, [%1];" : "=f"(value) : "l"(p) : "memory");
    return value;
}

template <bool HALF> __device__ __forceinline__ float rounded(float value) { return value_of<HALF>(bits_of<HALF>(value)); }

template <bool HALF> __device__ __forceinline__ void values8(float (&found)[8], uint4 v) {
    const u32 words[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        found[2 * i] = value_of<HALF>((u16)(words[i] & 0xFFFF));
        found[2 * i + 1] = value_of<HALF>((u16)(words[i] >> 16));
    }
}

// One row of a matrix times every token, in all lanes; plus the bias; rounded as a product and a sum are.
template <bool HALF, int TOKENS>
__device__ __forceinline__ void row_times_tokens(float (&found)[TOKENS], const u16* row, const u16* bias, const u16* x, int d_model) {
    constexpr int AHEAD = 8;
    const int own = (threadIdx.x & 31) * STEP;
#pragma unroll
    for (int t = 0; t < TOKENS; ++t) found[t] = 0.f;
    for (int from = own; from - own < d_model; from += AHEAD * COLUMNS) {
        uint4 weights[AHEAD];
#pragma unroll
        for (int i = 0; i < AHEAD; ++i) weights[i] = stream_if(row + from + i * COLUMNS, from + i * COLUMNS < d_model);
#pragma unroll
        for (int i = 0; i < AHEAD; ++i) {
            const int column = from + i * COLUMNS;
            float w[8], v[8];
            values8<HALF>(w, weights[i]);
#pragma unroll
            for (int t = 0; t < TOKENS; ++t) {
                values8<HALF>(v, load_if(x + (long)t * d_model + column, column < d_model));
#pragma unroll
                for (int e = 0; e < 8; ++e) found[t] = fmaf(w[e], v[e], found[t]);
            }
        }
    }
#pragma unroll
    for (int t = 0; t < TOKENS; ++t) {
#pragma unroll
        for (int apart = 16; apart; apart >>= 1) found[t] += __shfl_xor_sync(0xFFFFFFFFu, found[t], apart);
        found[t] = rounded<HALF>(found[t]);
        if (bias) found[t] = rounded<HALF>(found[t] + value_of<HALF>(*bias));
    }
}

// The two matrices of a branch: that whose product is activated and compared, and that which may be left out.
struct Rows {
    const u16* compared; const u16* compared_bias; const u16* other; const u16* other_bias;
};

// h [tokens, heavy + rest]: zero for neurons that are left out; heavy ones never are. Grid: eight neurons a block.
template <int ACT, bool GATED, bool HALF, int TOKENS>
__global__ void __launch_bounds__(THREADS, TOKENS == 1 ? 4 : TOKENS == 2 ? 3 : 2) inner(
    const u16* x, u16* h, u32* arrived, const u16* threshold,
    const u16* hc, const u16* hcb, const u16* ho, const u16* hob,
    const u16* rc, const u16* rcb, const u16* ro, const u16* rob,
    int heavy, int rest, int d_model, int shared
) {
    // Counted in `outer`; every call has counters of its own.
    if (blockIdx.x == 0)
        for (int slice = threadIdx.x; slice * COLUMNS < d_model; slice += THREADS) arrived[slice] = 0;
    const int neuron = blockIdx.x * WARPS + (threadIdx.x >> 5);
    if (neuron >= heavy + rest) return;
    const bool always = neuron < heavy;
    const int index = always ? neuron : neuron - heavy;
    const Rows rows = always ? Rows{hc, hcb, ho, hob} : Rows{rc, rcb, ro, rob};
    float a[TOKENS];
    const u16* bias = rows.compared_bias ? rows.compared_bias + index : nullptr;
    row_times_tokens<HALF, TOKENS>(a, rows.compared + (long)index * d_model, bias, x, d_model);
    const float limit = always ? 0.f : value_of<HALF>(threshold[shared ? 0 : index]);
    bool works = false;
#pragma unroll
    for (int t = 0; t < TOKENS; ++t) {
        a[t] = rounded<HALF>(activated<ACT>(a[t]));
        if (!always && !(fabsf(a[t]) > limit)) a[t] = 0.f;
        works |= a[t] != 0.f;
    }
    if constexpr (GATED) {
        if (works) {
            float u[TOKENS];
            const u16* other_bias = rows.other_bias ? rows.other_bias + index : nullptr;
            row_times_tokens<HALF, TOKENS>(u, rows.other + (long)index * d_model, other_bias, x, d_model);
#pragma unroll
            for (int t = 0; t < TOKENS; ++t)
                if (a[t] != 0.f) a[t] *= u[t];
        }
    }
    if ((threadIdx.x & 31) == 0)
#pragma unroll
        for (int t = 0; t < TOKENS; ++t) h[(long)t * (heavy + rest) + neuron] = bits_of<HALF>(a[t]);
}

// y = down h + bias. Grid: slices of 256 columns, shares of the neurons. Share s has the runs s, s + shares, ... of eight
// neurons each, so that shares are alike whatever the order of the neurons.
template <bool HALF, int TOKENS>
__global__ void __launch_bounds__(THREADS, TOKENS == 1 ? 4 : 2) outer(
    const u16* h, const u16* heavy_down, const u16* rest_down, const u16* bias, float* partial, u32* arrived, u16* y,
    int heavy, int rest, int d_model
) {
    constexpr int AHEAD = 8;
    __shared__ int listed[LISTED];
    __shared__ u16 factors[TOKENS][LISTED];
    __shared__ int counts[WARPS];
    __shared__ float parts[WARPS][STEP][32];
    __shared__ bool is_last;
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, neurons = heavy + rest;
    const int slice = blockIdx.x, share = blockIdx.y, shares = gridDim.y;
    const int runs = (neurons + RUN - 1) / RUN, items = (runs - share + shares - 1) / shares * RUN;
    const int column = slice * COLUMNS + lane * STEP;
    float sums[TOKENS][STEP] = {};
    for (int from = 0; from < items; from += LISTED) {
        // Neurons of this share that work for some token, in their order.
        u16 own[ROUNDS][TOKENS];
        int neuron[ROUNDS], before[ROUNDS], count = 0;
#pragma unroll
        for (int r = 0; r < ROUNDS; ++r) {
            const int item = from + (warp * ROUNDS + r) * 32 + lane;
            neuron[r] = (item / RUN * shares + share) * RUN + item % RUN;
            const bool inside = item < items && neuron[r] < neurons;
#pragma unroll
            for (int t = 0; t < TOKENS; ++t) own[r][t] = inside ? h[(long)t * neurons + neuron[r]] : 0;
        }
#pragma unroll
        for (int r = 0; r < ROUNDS; ++r) {
            u32 bits = 0;
#pragma unroll
            for (int t = 0; t < TOKENS; ++t) bits |= own[r][t] & 0x7FFF;
            const u32 votes = __ballot_sync(0xFFFFFFFFu, bits != 0);
            before[r] = bits ? count + __popc(votes & ((1u << lane) - 1)) : -1;
            count += __popc(votes);
        }
        if (lane == 0) counts[warp] = count;
        __syncthreads();
        int first = 0, total = 0;
#pragma unroll
        for (int w = 0; w < WARPS; ++w) {
            if (w < warp) first += counts[w];
            total += counts[w];
        }
#pragma unroll
        for (int r = 0; r < ROUNDS; ++r) {
            if (before[r] < 0) continue;
            listed[first + before[r]] = neuron[r];
#pragma unroll
            for (int t = 0; t < TOKENS; ++t) factors[t][first + before[r]] = own[r][t];
        }
        __syncthreads();
        for (int place = warp; place < total; place += AHEAD * WARPS) {
            uint4 weights[AHEAD];
#pragma unroll
            for (int i = 0; i < AHEAD; ++i) {
                const int at = min(place + i * WARPS, total - 1), j = listed[at];
                const u16* row = j < heavy ? heavy_down + (long)j * d_model : rest_down + (long)(j - heavy) * d_model;
                weights[i] = stream_if(row + column, place + i * WARPS < total && column < d_model);
            }
#pragma unroll
            for (int i = 0; i < AHEAD; ++i) {
                const int at = place + i * WARPS;
                float w[8];
                values8<HALF>(w, weights[i]);
#pragma unroll
                for (int t = 0; t < TOKENS; ++t) {
                    const float factor = at < total ? value_of<HALF>(factors[t][at]) : 0.f;
#pragma unroll
                    for (int e = 0; e < STEP; ++e) sums[t][e] = fmaf(factor, w[e], sums[t][e]);
                }
            }
        }
        __syncthreads();
    }
    // A thread's sum over the warps is that of element threadIdx.x / 32 of lane threadIdx.x % 32.
    const long padded = (long)gridDim.x * COLUMNS, place = (long)slice * COLUMNS + threadIdx.x;
#pragma unroll
    for (int t = 0; t < TOKENS; ++t) {
        if (t) __syncthreads();
#pragma unroll
        for (int e = 0; e < STEP; ++e) parts[warp][e][lane] = sums[t][e];
        __syncthreads();
        float total = 0.f;
#pragma unroll
        for (int w = 0; w < WARPS; ++w) total += parts[w][warp][lane];
        partial[(long)(share * TOKENS + t) * padded + place] = total;
    }
    __threadfence();
    __syncthreads();
    if (threadIdx.x == 0) is_last = atomicAdd(arrived + slice, 1u) == (u32)(shares - 1);
    __syncthreads();
    if (!is_last) return;
    __threadfence();
    const int own_column = slice * COLUMNS + lane * STEP + warp;
    if (own_column >= d_model) return;
#pragma unroll
    for (int t = 0; t < TOKENS; ++t) {
        float total = bias ? value_of<HALF>(bias[own_column]) : 0.f;
#pragma unroll 8
        for (int s = 0; s < shares; ++s) total += fresh(partial + (long)(s * TOKENS + t) * padded + place);
        y[(long)t * d_model + own_column] = bits_of<HALF>(total);
    }
}
