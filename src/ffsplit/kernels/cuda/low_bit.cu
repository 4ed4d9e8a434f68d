// The whole FFN over packed low-bit codes in two launches: up, gate and activation; then down. For more than eight tokens a short
// launch in front puts them in order.
//
// A warp multiplies 16 rows of a weight matrix with 8 tokens a tensor-core instruction (m16n8k16, weights on the left).
// The order of the inner dimension is free as long as both sides agree on it, and it is chosen such that every thread
// reads its codes straight from the stored layout: of a group of G columns, thread t of a row's four owns columns
// t * G/4 to (t + 1) * G/4 - 1, which lie in 16 consecutive bytes at 4 bits and G = 128. `inner` writes its result in the
// order in which `outer` reads it.
//
// The warps of a block share the groups of the same rows and meet only to add up their sums at the end. Until then each
// asks for codes several pieces ahead, through shared memory: every thread copies what it alone will use, so that there is
// nothing to wait for but its own copies, and registers are left to the products. Tokens come the same way; or a team of warps at
// different rows goes through the same groups and copies them once for all, which costs a barrier a piece. A launch starts before
// the one in front has ended, and has its first weights on their way by then.
//
// Codes are halves as they are: the bits of a whole number n below 256 (bfloat16) or 2048 (float16), read as a half, are n times
// the smallest half there is. So a mask is all that decoding takes, and two or four codes of a byte stand where they are: what
// stands k bits higher is 2^k times as large, and its tokens are made smaller by as much. Tensor cores take such numbers at
// their value. Tokens in bfloat16 are lifted by 2^56 for it, so that products of those from 2^-49 to 2^71 are ordinary float32
// numbers. A group's zero is taken off its sums: a product with ones finds the sum of its tokens, or the launch in front did; for
// many hidden activations it is taken off the codes, an addition a pair. The scale of a group multiplies the float32 sum of its
// products. Heavy and rest branches share a grid.
//
// RESIDENT warps must find room for their registers on a multiprocessor.
//
// Layout of codes: ffsplit/ops/packing.py. Scales: the bits of float16 numbers, or bytes in units of a 256th of a float16 per row.

struct Matrix {
    const u8* codes;     // [rows, stride] bytes
    const void* scale;   // [rows, groups] float16 bits, or bytes if unit is given
    const u8* zero;      // one packed row of rows * groups zeros; null: symmetric
    const u16* unit;     // [rows] float16; null: scales are float16
    int rows, columns;
};

template <int BITS> __device__ __forceinline__ u32 row_bytes(int columns) { return (long)columns * BITS / 8; }

__device__ __forceinline__ u32 permute(u32 a, u32 b, u32 selector) {
    u32 found;
    asm("prmt.b32 %0, %1, %2, %3;" : "=r"(found) : "r"(a), "r"(b), "r"(selector));
    return found;
}

// a * b + c, two halves at a time.
template <bool HALF> __device__ __forceinline__ u32 multiply_add(u32 a, u32 b, u32 c) {
    u32 found;
    if (HALF) asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(found) : "r"(a), "r"(b), "r"(c));
    else asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(found) : "r"(a), "r"(b), "r"(c));
    return found;
}

template <bool HALF> constexpr u32 ONES = HALF ? 0x3C003C00u : 0x3F803F80u;
__device__ __forceinline__ float power(int exponent) { return __int_as_float((127 + exponent) << 23); }  // of two

// The power of two by which tokens are lifted, and what a product with a code's bits has to be multiplied by.
template <bool HALF> constexpr int LIFT = HALF ? 0 : 56;
template <bool HALF> constexpr float UNIT = HALF ? 0x1p24f : 0x1p77f;

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

// RING bytes for each warp: codes and tokens on their way, and the warp's sums at the end.
extern __shared__ __align__(16) u8 memory[];

__device__ __forceinline__ u32 shared_address(const void* p) { return (u32)__cvta_generic_to_shared(p); }

// Asks for bytes of memory, or for zeros if they are not there; 16 at a time, past the first-level cache if they are read ONCE.
template <int BYTES, bool ONCE> __device__ __forceinline__ void copy(u32 to, const u8* from, bool there) {
    const int size = there ? BYTES : 0;
    if (BYTES == 16 && ONCE) asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(size) : "memory");
    else asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(to), "l"(from), "n"(BYTES), "r"(size) : "memory");
}
__device__ __forceinline__ void end_of_piece() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int LEFT> __device__ __forceinline__ void wait_for_pieces() { asm volatile("cp.async.wait_group %0;" ::"n"(LEFT) : "memory"); }

template <int WORDS> __device__ __forceinline__ void from_shared(u32* raw, u32 at) {
    if constexpr (WORDS == 4) asm volatile("ld.shared.v4.u32 {%0,%1,%2,%3}, [%4];" : "=r"(raw[0]), "=r"(raw[1]), "=r"(raw[2]), "=r"(raw[3]) : "r"(at) : "memory");
    else if constexpr (WORDS == 2) asm volatile("ld.shared.v2.u32 {%0,%1}, [%2];" : "=r"(raw[0]), "=r"(raw[1]) : "r"(at) : "memory");
    else asm volatile("ld.shared.u32 %0, [%1];" : "=r"(raw[0]) : "r"(at) : "memory");
}

// Pieces of 16 bytes or less in which a thread reads its codes of one row in one group.
template <int BITS, int G> constexpr int PIECES = BITS * G > 512 ? BITS * G / 512 : 1;

// One piece: neighbouring columns, in spans of eight. In shared memory the words of a warp's lanes stand side by side, those of
// 3 bits' second plane behind those of the first.
template <int BITS, int G> struct Codes {
    static constexpr int COLUMNS = G / 4 / PIECES<BITS, G>;
    static constexpr int LOW = COLUMNS * (BITS == 3 ? 2 : BITS) / 32, WORDS = LOW + (BITS == 3 ? 1 : 0);
    u32 raw[WORDS];

    static __device__ __forceinline__ void ask(u32 to, int lane, const u8* codes, u32 row, u32 columns, u32 column) {
        const bool there = column < columns;
        copy<4 * LOW, true>(to + lane * 4 * LOW, codes + (row + column * (BITS == 3 ? 2 : BITS) / 8), there);
        // Four bytes of 32 columns, of which a thread whose columns are 16 needs half.
        if (BITS == 3) copy<4, true>(to + 128 * LOW + lane * 4, codes + (row + columns / 4 + column / 32 * 4), there);
    }

    __device__ __forceinline__ void read(u32 from, int lane, u32 column) {
        from_shared<LOW>(raw, from + lane * 4 * LOW);
        if (BITS == 3) {
            from_shared<1>(raw + LOW, from + 128 * LOW + lane * 4);
            if (COLUMNS == 16) raw[LOW] >>= column & 16;
        }
    }
};

// Step and zero of one row in one group as they lie in memory; nothing is done to them before they are needed, so that
// nobody waits for them where they are asked for.
template <int BITS> struct Grid {
    u32 step, zero, high;

    __device__ __forceinline__ void load(const Matrix& m, u32 index, u32 groups) {
        step = m.unit ? ((const u8*)m.scale)[index] : ((const u16*)m.scale)[index];
        if (!m.zero) return;
        zero = m.zero[BITS == 4 ? index >> 1 : BITS < 4 ? index >> 2 : index];
        if (BITS == 3) high = m.zero[(m.rows * groups + 7) / 8 * 2 + (index >> 3)];
    }

    // The step (upper half: a float16, a multiple of the row's unit if there is one) and the zero (lower half: a whole number or
    // a float16).
    template <bool FLOATING> __device__ __forceinline__ u32 packed(const Matrix& m, u32 index) const {
        u32 found = 1 << (BITS - 1);
        if (m.zero) {
            found = zero;
            if (BITS == 4) found = zero >> (4 * (index & 1)) & 15;
            if (BITS < 4) found = zero >> (2 * (index & 3)) & 3;
            if (BITS == 3) found |= (high >> (index & 7) & 1) << 2;
        }
        return (m.unit ? half_of(step) : step) << 16 | (FLOATING ? half_of(found) : found);
    }
};

// Eight neighbouring columns as the four pairs that `decode` finds: of which pair a column is, whether it is the second one, and
// how many bits above the lowest the codes of a pair stand.
template <int BITS, bool HALF> struct Order {
    static constexpr __device__ __forceinline__ int pair(int j) { return BITS == 16 ? j / 2 : BITS == 8 ? j / 4 * 2 + j % 2 : j % 4; }
    static constexpr __device__ __forceinline__ int second(int j) { return BITS == 16 ? j % 2 : BITS == 8 ? j / 2 % 2 : j / 4; }
    static constexpr __device__ __forceinline__ int above(int pair) {
        if (HALF || BITS >= 8) return 0;  // tokens in float16 cannot be made smaller without a loss
        if (BITS == 4) return pair % 2 * 4;
        return BITS == 3 && pair == 3 ? 4 : pair * 2;  // a third bit above the sixth would not fit
    }

    // Two values of a token of one pair, times its power of two.
    static __device__ __forceinline__ u32 lifted(u32 two, int pair) {
        return HALF ? two : multiply_add<HALF>(two, (u32)(127 + LIFT<HALF> - above(pair)) * 0x00800080u, 0x80008000u);
    }

    // Eight values of a token in this order.
    static __device__ __forceinline__ uint4 of(uint4 v) {
        if (BITS == 8) v = make_uint4(permute(v.x, v.y, 0x5410), permute(v.x, v.y, 0x7632), permute(v.z, v.w, 0x5410), permute(v.z, v.w, 0x7632));
        if (BITS < 8) v = make_uint4(permute(v.x, v.z, 0x5410), permute(v.x, v.z, 0x7632), permute(v.y, v.w, 0x5410), permute(v.y, v.w, 0x7632));
        return make_uint4(lifted(v.x, 0), lifted(v.y, 1), lifted(v.z, 2), lifted(v.w, 3));
    }
};

// Eight weights of one row: those of 16 bits, else codes at their bits.
template <int BITS, bool HALF, int G>
__device__ __forceinline__ void decode(u32 (&pairs)[4], const Codes<BITS, G>& codes, int span) {
    const u32* raw = codes.raw;
    u32 spread = 0, third = 0;
    if constexpr (BITS < 4) spread = permute(raw[span / 2], 0, span % 2 ? 0x4342 : 0x4140);  // a byte of four codes in each half
    if constexpr (BITS == 3) {
        third = raw[Codes<BITS, G>::LOW] >> (8 * span) & 0xFF;
        third = (third | third << 12) << 2;
    }
#pragma unroll
    for (int p = 0; p < 4; ++p) {
        const int above = Order<BITS, HALF>::above(p);
        if constexpr (BITS == 16) pairs[p] = raw[4 * span + p];
        if constexpr (BITS == 8) pairs[p] = permute(raw[2 * span + p / 2], 0, p % 2 ? 0x4341 : 0x4240);
        if constexpr (BITS == 4) pairs[p] = raw[span] >> (4 * p - above) & 0x000F000Fu << above;
        if constexpr (BITS < 4) pairs[p] = spread >> (2 * p - above) & 0x00030003u << above;
        if constexpr (BITS == 3) pairs[p] |= (above > p ? third << (above - p) : third >> (p - above)) & 0x00040004u << above;
    }
}

// Where value k of a token stands among tokens that are arranged as the tensor cores' right operand: by tiles of eight
// tokens, groups, spans of eight columns and lanes, so that a warp reads 512 bytes in a row.
template <int BITS, int G, bool HALF> __device__ __forceinline__ long arranged(int token, int k, int groups) {
    const int t = k % G / (G / 4), span = k % (G / 4) / 8, j = k % 8;
    const long vector = (((long)(token / 8) * groups + k / G) * (G / 32) + span) * 32 + token % 8 * 4 + t;
    return vector * 8 + Order<BITS, HALF>::pair(j) * 2 + Order<BITS, HALF>::second(j);
}

// Tokens on their way to a warp: of all eight tokens of NT tiles SPANS spans of a group, a span of 512 bytes behind the other.
// What lies beyond the columns counts as zero.
//
// Rows of values, whose vectors have yet to be put in order, for warps on their own: one tile of at most eight.
template <int G, int SPANS> struct Rows {
    const u16* from;
    int columns, column, lane;
    bool there;

    __device__ __forceinline__ Rows(const u16* x, int columns, int count, int lane)
        : from(x + (long)(lane >> 2) * columns + (lane & 3) * (G / 4)), columns(columns), column((lane & 3) * (G / 4)), lane(lane),
          there((lane >> 2) < count) {}

    __device__ __forceinline__ void ask(u32 at, int group, int first) const {
        const u16* start = from + (u32)(group * G + first * 8);
#pragma unroll
        for (int s = 0; s < SPANS; ++s)
            copy<16, false>(at + s * 512 + lane * 16, (const u8*)(start + s * 8), there && group * G + column < columns);
    }
};

// Arranged ones, of which every warp of a team copies its part, past the first-level cache, which is better left to steps and zeros.
// All NT tiles are read, and may hold anything behind the last token: no output is of it.
template <int G, int SPANS, int NT, int ACROSS> struct Share {
    static_assert((ACROSS & (ACROSS - 1)) == 0);
    static constexpr int PARTS = NT * SPANS, COUNT = PARTS > ACROSS ? PARTS / ACROSS : 1;
    static constexpr int TILES = COUNT > SPANS ? COUNT / SPANS : 1, EACH = COUNT / TILES;
    const u8* x;
    u32 from[TILES], to;
    int columns, column;
    bool idle;

    __device__ __forceinline__ Share(const u16* x, int columns, int member, int lane)
        : x((const u8*)x), columns(columns), column((lane & 3) * (G / 4)) {
        const int part = member * COUNT;
        idle = PARTS < ACROSS && part >= PARTS;
        to = part * 512 + lane * 16;
#pragma unroll
        for (int n = 0; n < TILES; ++n) {
            from[n] = (part / SPANS + n) * 16 * ((columns + G - 1) / G * G) + part % SPANS * 512 + lane * 16;
            asm volatile("" : "+r"(from[n]));  // computed once, not in every turn
        }
        asm volatile("" : "+r"(to));
    }

    __device__ __forceinline__ void ask(u32 at, int group, int first) const {
        if (idle) return;
        const bool there = group * G + column < columns;
#pragma unroll
        for (int n = 0; n < TILES; ++n) {
            const u8* start = x + (from[n] + (u32)(group * (16 * G) + first * 512));
#pragma unroll
            for (int j = 0; j < EACH; ++j) copy<16, true>(at + to + (n * EACH + j) * 512, start + j * 512, there);
        }
    }
};

// What a piece takes in shared memory.
template <int BITS, int G, int MATRICES> constexpr int CODE_BYTES = MATRICES * 256 * Codes<BITS, G>::WORDS;
template <int BITS, int G, int NT> constexpr int TOKEN_BYTES = NT * (G / 32 / PIECES<BITS, G>) * 512;
// Pieces of a warp that are on their way while it works on one.
template <int RING, int BYTES> constexpr int DEPTH = RING / BYTES < 8 ? RING / BYTES : 8;

// Waits for the warps of a team.
template <int ACROSS> __device__ __forceinline__ void meet(int team) {
    if (ACROSS == 1) __syncwarp();
    else asm volatile("bar.sync %0, %1;" ::"r"(team + 1), "n"(ACROSS * 32) : "memory");
}

// Lets the next kernel of the stream start, and waits for the one in front to end.
__device__ __forceinline__ void let_next_start() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;");
#endif
}
__device__ __forceinline__ void wait_for_front() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// Adds the products of rows of several matrices, TALL times 16 of each, with the same tokens over the groups first,
// first + stride, ... Sums are those of all matrices' first 16 rows, then of all their next ones.
//
// INNER: tokens are those of the FFN. Of one tile they are rows of values; else they are arranged, and the sum of a group is given
// for each.
//
// ACROSS warps at different rows are a team: they go through the same groups and share the tokens, of which each copies a part.
template <int BITS, int G, int SEVERAL, int TALL, int NT, bool HALF, bool INNER, int ACROSS, int RING>
__device__ __forceinline__ void accumulate(
    float (&sums)[SEVERAL * TALL][NT][4], const Matrix (&m)[SEVERAL], const int (&row)[TALL][2], const u16* x,
    const float* given, int tokens, int first, int stride, bool wait
) {
    constexpr int MATRICES = SEVERAL * TALL, P = PIECES<BITS, G>, SPANS = G / 32 / P;
    // A team's ring has the codes of all its warps and then the tokens of one piece after the other.
    constexpr int CODES = CODE_BYTES<BITS, G, MATRICES>, BYTES = ACROSS * CODES + TOKEN_BYTES<BITS, G, NT>;
    constexpr int D = DEPTH<ACROSS * RING, BYTES>;
    static_assert(D > (ACROSS > 1));
    // A piece of tokens can be replaced when the whole team has read it: one turn later.
    constexpr int AHEAD = ACROSS > 1 ? D - 1 : D;
    constexpr bool ARRANGED = !INNER || NT > 1, GIVEN = INNER && ARRANGED;
    static_assert(ARRANGED || ACROSS == 1);
    constexpr bool LATER = GIVEN || NT <= 2;  // more tiles share what it costs to take zeros off the codes
    using Placed = Order<BITS, HALF>;
    const int lane = threadIdx.x & 31, t = lane & 3, columns = m[0].columns, groups = (columns + G - 1) / G;
    const int team = (threadIdx.x >> 5) / ACROSS, member = (threadIdx.x >> 5) % ACROSS;
    u32 ring = shared_address(memory) + team * ACROSS * RING + member * CODES, to_tokens = (ACROSS - member) * CODES;
    if (ACROSS > 1) asm volatile("" : "+r"(ring), "+r"(to_tokens));
    const Share<G, SPANS, NT, ACROSS> share(x, columns, member, lane);
    const Rows<G, SPANS> rows(x, columns, tokens, lane);
    Grid<BITS> coming[MATRICES][2];
    u32 grid[MATRICES][2];
    float unit[MATRICES][2];
    // What the steps of a row have in common; of 16-bit weights a power of two.
    const auto find_units = [&](int exponent) {
#pragma unroll
        for (int k = 0; k < MATRICES; ++k)
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                const u16* of = m[k % SEVERAL].unit;
                unit[k][i] = BITS == 16 ? power(exponent) : of ? half_value(of[row[k / SEVERAL][i]]) / 256.f * UNIT<HALF> : UNIT<HALF>;
            }
    };
    const auto times_units = [&] {
#pragma unroll
        for (int k = 0; k < MATRICES; ++k)
#pragma unroll
            for (int n = 0; n < NT; ++n)
#pragma unroll
                for (int e = 0; e < 4; ++e) sums[k][n][e] *= unit[k][e >> 1];
    };
    // Thread t of a row's four fetches step and zero of every fourth group that the warp works on.
    const auto place = [&](int k, int i, int from) { return (u32)(row[k / SEVERAL][i] * groups + min(from + t * stride, groups - 1)); };
    const auto fetch = [&](int from) {
        if (BITS == 16) return;
#pragma unroll
        for (int k = 0; k < MATRICES; ++k)
#pragma unroll
            for (int i = 0; i < 2; ++i) coming[k][i].load(m[k % SEVERAL], place(k, i, from), groups);
    };
    u32 start[TALL][2];
#pragma unroll
    for (int j = 0; j < TALL; ++j)
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            start[j][i] = row[j][i] * row_bytes<BITS>(columns);
            asm volatile("" : "+r"(start[j][i]));  // computed once, not in every turn
        }
    const auto column_of = [&](int group, int piece) { return (u32)(group * G + t * (G / 4) + piece * Codes<BITS, G>::COLUMNS); };
    const auto place_of = [&](u32 at, int k, int i) { return at + (k * 2 + i) * 128 * Codes<BITS, G>::WORDS; };
    const auto ask_codes = [&](u32 at, int group, int piece) {
        if (group < groups)
#pragma unroll
            for (int k = 0; k < MATRICES; ++k)
#pragma unroll
                for (int i = 0; i < 2; ++i)
                    Codes<BITS, G>::ask(place_of(at, k, i), lane, m[k % SEVERAL].codes, start[k / SEVERAL][i], columns, column_of(group, piece));
    };
    const auto ask_tokens = [&](u32 at, int group, int piece) {
        if (group >= groups) return;
        if constexpr (ARRANGED) share.ask(at, group, piece * SPANS);
        else rows.ask(at, group, piece * SPANS);
    };
    meet<ACROSS>(team);  // what an accumulation before this one left here has been read
    if (first < groups) {
#pragma unroll
        for (int d = 0; d < AHEAD; ++d) ask_codes(ring + d * BYTES, first + d / P * stride, d % P);
        fetch(first);
        // `inner` has no sums of another branch yet, and can leave its units to the end.
        if (BITS != 16 && !INNER) find_units(0);
    }
    // Weights are on their way; tokens may still be made by the kernel in front.
    if (wait) wait_for_front();
    if (first >= groups) return;
#pragma unroll
    for (int d = 0; d < AHEAD; ++d) {
        ask_tokens(ring + d * BYTES + to_tokens, first + d / P * stride, d % P);
        end_of_piece();  // the first one's has the codes of all
    }
    int turn = 0;
    u32 zero[MATRICES][2];
    float found[MATRICES][NT][4], total[NT][4];
    // Step and zero of a row in this turn's group, from the thread that fetched them.
    const auto grid_of = [&](int k, int i) { return __shfl_sync(0xFFFFFFFFu, grid[k][i], (lane & ~3) | turn); };
    const auto begin = [&](int group) {
        if (BITS == 16) return;
        if (turn == 0) {
#pragma unroll
            for (int k = 0; k < MATRICES; ++k)
#pragma unroll
                for (int i = 0; i < 2; ++i) grid[k][i] = coming[k][i].template packed<LATER>(m[k % SEVERAL], place(k, i, group));
            if (group + 4 * stride < groups) fetch(group + 4 * stride);
        }
        if (!LATER)
#pragma unroll
            for (int k = 0; k < MATRICES; ++k)
#pragma unroll
                for (int i = 0; i < 2; ++i) zero[k][i] = permute(grid_of(k, i), 0, 0x1010);
#pragma unroll
        for (int n = 0; n < NT; ++n) {
            if (GIVEN) {
                const float2 two = *(const float2*)(given + (u32)((n * groups + group) * 8 + t * 2));
                total[n][0] = two.x;
                total[n][1] = two.y;
            }
#pragma unroll
            for (int e = 0; e < 4; ++e) {
                if (!GIVEN) total[n][e] = 0.f;
#pragma unroll
                for (int k = 0; k < MATRICES; ++k) found[k][n][e] = 0.f;
            }
        }
    };
    const auto work = [&](const Codes<BITS, G> (&now)[MATRICES][2], u32 tokens_at) {
#pragma unroll
        for (int s = 0; s < SPANS; ++s) {
            u32 a[MATRICES][2][4];
#pragma unroll
            for (int k = 0; k < MATRICES; ++k)
#pragma unroll
                for (int i = 0; i < 2; ++i) {
                    decode<BITS, HALF, G>(a[k][i], now[k][i], s);
                    if (BITS == 16 || LATER) continue;
#pragma unroll
                    for (int p = 0; p < 4; ++p) a[k][i][p] = multiply_add<HALF>(a[k][i][p], ONES<HALF>, zero[k][i] << Placed::above(p) | 0x80008000u);
                }
#pragma unroll
            for (int n = 0; n < NT; ++n) {
                uint4 v;
                from_shared<4>(&v.x, tokens_at + (n * SPANS + s) * 512 + lane * 16);
                if (!ARRANGED) v = Placed::of(v);
#pragma unroll
                for (int k = 0; k < MATRICES; ++k) {
                    const u32 left[4] = {a[k][0][0], a[k][1][0], a[k][0][1], a[k][1][1]};
                    const u32 right[4] = {a[k][0][2], a[k][1][2], a[k][0][3], a[k][1][3]};
                    multiply<HALF>(BITS == 16 ? sums[k][n] : found[k][n], left, v.x, v.y);
                    multiply<HALF>(BITS == 16 ? sums[k][n] : found[k][n], right, v.z, v.w);
                }
                if (BITS != 16 && LATER && !GIVEN) {
                    const auto one = [](int pair) { return 0x00010001u << Placed::above(pair); };
                    const u32 left[4] = {one(0), one(0), one(1), one(1)}, right[4] = {one(2), one(2), one(3), one(3)};
                    multiply<HALF>(total[n], left, v.x, v.y);
                    multiply<HALF>(total[n], right, v.z, v.w);
                }
            }
        }
    };
    const auto end = [&] {
        if (BITS == 16) return;
#pragma unroll
        for (int k = 0; k < MATRICES; ++k)
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                const u32 here = grid_of(k, i);
                const float step = INNER ? half_value(here >> 16) : half_value(here >> 16) * unit[k][i], off = half_value(here & 0xFFFF);
#pragma unroll
                for (int n = 0; n < NT; ++n)
#pragma unroll
                    for (int e = 2 * i; e < 2 * i + 2; ++e)
                        sums[k][n][e] += step * (LATER ? found[k][n][e] - off * total[n][e & 1] : found[k][n][e]);
            }
    };
    // 16-bit weights multiply tokens that are lifted, and their products are added to sums that are not.
    if (BITS == 16 && !HALF) {
        find_units(LIFT<HALF>);
        times_units();
    }
    u32 at = ring, before = ring + (D - 1) * BYTES;
    for (int group = first; group < groups; group += stride, turn = (turn + 1) & 3) {
        begin(group);
#pragma unroll
        for (int piece = 0; piece < P; ++piece) {
            Codes<BITS, G> now[MATRICES][2];
            wait_for_pieces<AHEAD - 1>();
#pragma unroll
            for (int k = 0; k < MATRICES; ++k)
#pragma unroll
                for (int i = 0; i < 2; ++i) now[k][i].read(place_of(at, k, i), lane, column_of(group, piece));
            const int next = piece + AHEAD;
            if constexpr (ACROSS == 1) {
                work(now, at + to_tokens);
                ask_codes(at, group + next / P * stride, next % P);
                ask_tokens(at + to_tokens, group + next / P * stride, next % P);
                end_of_piece();
                at = at == ring + (D - 1) * BYTES ? ring : at + BYTES;
            } else {
                meet<ACROSS>(team);
                ask_codes(before, group + next / P * stride, next % P);
                ask_tokens(before + to_tokens, group + next / P * stride, next % P);
                end_of_piece();
                work(now, at + to_tokens);
                before = at;
                at = at == ring + (D - 1) * BYTES ? ring : at + BYTES;
            }
        }
        end();
    }
    if (BITS == 16 ? !HALF : INNER) {
        find_units(-LIFT<HALF>);
        times_units();
    }
}

// What the warps of a block found, one element after the other: finish(row of the block's first tile, token, its sums).
template <int RING, int MATRICES, int TALL, int NT, int WARPS, int ACROSS, class Finish>
__device__ __forceinline__ void add_up(float (&sums)[MATRICES][NT][4], Finish finish) {
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
    constexpr int TILES = NT == 1 ? 1 : 2;
    static_assert(MATRICES * TILES * 512 <= RING);
    // Every warp leaves its sums where its own codes were, of two tiles of tokens at a time.
    const auto part = [&](int w, int k, int place) { return (float*)(memory + w * RING) + (k * TILES * 4 + place) * 32; };
    if (ACROSS == 1) __syncwarp();
#pragma unroll
    for (int from = 0; from < NT; from += TILES) {
        if (from || ACROSS > 1) __syncthreads();
#pragma unroll
        for (int k = 0; k < MATRICES; ++k)
#pragma unroll
            for (int n = 0; n < TILES; ++n)
#pragma unroll
                for (int e = 0; e < 4; ++e) part(warp, k, n * 4 + e)[lane] = sums[k][from + n][e];
        __syncthreads();
        for (int index = threadIdx.x; index < ACROSS * TILES * 4 * 32; index += WARPS * 32) {
            const int member = (index >> 5) / (TILES * 4), place = (index >> 5) % (TILES * 4), of = index & 31;
            float total[MATRICES];
#pragma unroll
            for (int k = 0; k < MATRICES; ++k) {
                total[k] = 0.f;
#pragma unroll
                for (int w = 0; w < WARPS; w += ACROSS) total[k] += part(w + member, k, place)[of];
            }
            finish(member * 16 * TALL + (of >> 2) + 8 * (place >> 1 & 1), (from + (place >> 2)) * 8 + (of & 3) * 2 + (place & 1), total);
        }
    }
}

// The rows of a lane, none beyond the last one.
template <int TALL> __device__ __forceinline__ void rows_of(int (&row)[TALL][2], int first, int rows) {
    const int lane = threadIdx.x & 31;
#pragma unroll
    for (int j = 0; j < TALL; ++j)
#pragma unroll
        for (int i = 0; i < 2; ++i) row[j][i] = min(first + j * 16 + i * 8 + (lane >> 2), rows - 1);
}

template <int BITS, int G, int NT, int ACT, bool GATED, bool HALF, int WARPS, int ACROSS, int TALL, int RING>
__device__ __forceinline__ void inner_block(
    const u16* x, const float* given, u16* h, const Matrix& gate, const Matrix& up, const u16* gate_bias,
    const u16* up_bias, int block, int tokens
) {
    constexpr int SEVERAL = GATED ? 2 : 1;
    const int warp = threadIdx.x >> 5, first = block * 16 * TALL * ACROSS, groups = (up.rows + G - 1) / G;
    using Placed = Order<BITS, HALF>;
    int row[TALL][2];
    rows_of<TALL>(row, first + warp % ACROSS * 16 * TALL, up.rows);
    float sums[SEVERAL * TALL][NT][4] = {};
    if constexpr (GATED) {
        const Matrix both[2] = {up, gate};
        accumulate<BITS, G, 2, TALL, NT, HALF, true, ACROSS, RING>(sums, both, row, x, given, tokens, warp / ACROSS, WARPS / ACROSS, NT > 1);
    } else {
        const Matrix one[1] = {up};
        accumulate<BITS, G, 1, TALL, NT, HALF, true, ACROSS, RING>(sums, one, row, x, given, tokens, warp / ACROSS, WARPS / ACROSS, NT > 1);
    }
    add_up<RING, SEVERAL * TALL, TALL, NT, WARPS, ACROSS>(sums, [&](int r, int token, float (&total)[SEVERAL * TALL]) {
#pragma unroll
        for (int j = 0; j < TALL; ++j) {
            const int neuron = first + j * 16 + r;
            if (neuron >= up.rows || token >= tokens) return;
            const float u = total[j * SEVERAL] + (up_bias ? value_of<HALF>(up_bias[neuron]) : 0.f);
            float found;
            if constexpr (GATED) found = activated<ACT>(total[j * SEVERAL + 1] + (gate_bias ? value_of<HALF>(gate_bias[neuron]) : 0.f)) * u;
            else found = activated<ACT>(u);
            h[arranged<BITS, G, HALF>(token, neuron, groups)] = bits_of<HALF>(found * power(LIFT<HALF> - Placed::above(Placed::pair(neuron % 8))));
        }
    });
}

template <int HEAVY_BITS, int REST_BITS>
constexpr bool SEVERAL_ORDERS = HEAVY_BITS != 0 && HEAVY_BITS != REST_BITS;

// Tokens in the order of either branch, one behind the other, or once if both have the same; and the sums of their groups, in the
// unit of products with codes: for every tile and group those of eight tokens. A warp does a group of a tile.
template <int HEAVY_BITS, int REST_BITS, int G, bool HALF>
__global__ void __launch_bounds__(128) arrange(const u16* x, u16* to, float* given, int tokens, int columns) {
    wait_for_front();  // first: the next launch takes it that all in front of this one have ended
    let_next_start();
    const int groups = (columns + G - 1) / G, tiles = (tokens + 7) / 8, lane = threadIdx.x & 31;
    const int index = blockIdx.x * 4 + threadIdx.x / 32, token = index / groups * 8 + (lane >> 2);
    if (index >= tiles * groups) return;
    float sum = 0.f;
#pragma unroll
    for (int span = 0; span < G / 32; ++span) {
        const int column = index % groups * G + (lane & 3) * (G / 4) + span * 8;
        uint4 v = make_uint4(0, 0, 0, 0);
        if (token < tokens && column < columns) v = *(const uint4*)(x + (long)token * columns + column);
        const u32 two[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
        for (int p = 0; p < 4; ++p) sum += value_of<HALF>(two[p] & 0xFFFF) + value_of<HALF>(two[p] >> 16);
        uint4* out = (uint4*)to + index * G + span * 32 + lane;
        if (SEVERAL_ORDERS<HEAVY_BITS, REST_BITS>) {
            *out = Order<HEAVY_BITS, HALF>::of(v);
            out += tiles * groups * G;
        }
        *out = Order<REST_BITS, HALF>::of(v);
    }
    sum += __shfl_xor_sync(0xFFFFFFFFu, sum, 1);
    sum += __shfl_xor_sync(0xFFFFFFFFu, sum, 2);
    if ((lane & 3) == 0) given[index * 8 + (lane >> 2)] = sum / UNIT<HALF>;
}

// h = act(gate x) * (up x) of both branches, each arranged for `outer`; grid (blocks of 16 TALL ACROSS neurons, blocks of NT tiles).
template <int HEAVY_BITS, int REST_BITS, int G, int NT, int ACT, bool GATED, bool HALF, int WARPS, int ACROSS, int TALL, int RING, int RESIDENT>
__global__ void __launch_bounds__(WARPS * 32, (RESIDENT + WARPS - 1) / WARPS) inner(
    const u16* x, const float* given, u16* h,
    const u8* hg, const void* hgs, const u8* hgz, const u16* hgu, const u16* hgb,
    const u8* hu, const void* hus, const u8* huz, const u16* huu, const u16* hub,
    const u8* rg, const void* rgs, const u8* rgz, const u16* rgu, const u16* rgb,
    const u8* ru, const void* rus, const u8* ruz, const u16* ruu, const u16* rub,
    int tokens, int heavy, int rest, int d_model
) {
    if (NT == 1) wait_for_front();  // before anything is read: weights may have been written just now
    let_next_start();
    const int tile = blockIdx.y * NT, left = tokens - tile * 8, tiles = (tokens + 7) / 8;
    const long heavy_width = (long)(heavy + G - 1) / G * G, rest_width = (long)(rest + G - 1) / G * G;
    const long padded = NT > 1 ? (long)(d_model + G - 1) / G * G : d_model;  // of tokens in order, if they are
    x += tile * 8 * padded;
    given += tile * (padded / G * 8);
    const int heavy_blocks = (heavy + 16 * TALL * ACROSS - 1) / (16 * TALL * ACROSS), block = blockIdx.x;
    if constexpr (HEAVY_BITS != 0) {
        if (block < heavy_blocks) {
            inner_block<HEAVY_BITS, G, NT, ACT, GATED, HALF, WARPS, ACROSS, TALL, RING>(
                x, given, h + tile * 8 * heavy_width, {hg, hgs, hgz, hgu, heavy, d_model},
                {hu, hus, huz, huu, heavy, d_model}, hgb, hub, block, left);
            return;
        }
    }
    if (NT > 1 && SEVERAL_ORDERS<HEAVY_BITS, REST_BITS>) x += tiles * 8 * padded;
    inner_block<REST_BITS, G, NT, ACT, GATED, HALF, WARPS, ACROSS, TALL, RING>(
        x, given, h + tiles * 8 * heavy_width + tile * 8 * rest_width, {rg, rgs, rgz, rgu, rest, d_model},
        {ru, rus, ruz, ruu, rest, d_model}, rgb, rub, block - heavy_blocks, left);
}

// y = down h + bias over both branches; grid (blocks of 16 TALL ACROSS outputs, blocks of NT tiles).
template <int HEAVY_BITS, int REST_BITS, int G, int NT, bool HALF, int WARPS, int ACROSS, int TALL, int RING, int RESIDENT>
__global__ void __launch_bounds__(WARPS * 32, (RESIDENT + WARPS - 1) / WARPS) outer(
    const u16* h, u16* y, const u16* bias,
    const u8* hd, const void* hds, const u8* hdz, const u16* hdu,
    const u8* rd, const void* rds, const u8* rdz, const u16* rdu,
    int tokens, int heavy, int rest, int d_model
) {
    const int tile = blockIdx.y * NT, left = tokens - tile * 8, tiles = (tokens + 7) / 8;
    const int heavy_groups = (heavy + G - 1) / G, rest_groups = (rest + G - 1) / G;
    constexpr int TEAMS = WARPS / ACROSS;
    const int warp = threadIdx.x >> 5, team = warp / ACROSS, first = blockIdx.x * 16 * TALL * ACROSS;
    int row[TALL][2];
    rows_of<TALL>(row, first + warp % ACROSS * 16 * TALL, d_model);
    float sums[TALL][NT][4] = {};
    if constexpr (HEAVY_BITS != 0) {
        const Matrix one[1] = {{hd, hds, hdz, hdu, d_model, heavy}};
        const u16* part = h + (long)tile * 8 * heavy_groups * G;
        accumulate<HEAVY_BITS, G, 1, TALL, NT, HALF, false, ACROSS, RING>(sums, one, row, part, nullptr, left, team, TEAMS, true);
    }
    // The teams take turns across both branches, so that none has two groups more than another.
    const Matrix one[1] = {{rd, rds, rdz, rdu, d_model, rest}};
    const int turn = (team + TEAMS - heavy_groups % TEAMS) % TEAMS;
    const u16* part = h + (long)tiles * 8 * heavy_groups * G + (long)tile * 8 * rest_groups * G;
    accumulate<REST_BITS, G, 1, TALL, NT, HALF, false, ACROSS, RING>(sums, one, row, part, nullptr, left, turn, TEAMS, HEAVY_BITS == 0);
    add_up<RING, TALL, TALL, NT, WARPS, ACROSS>(sums, [&](int r, int token, float (&total)[TALL]) {
#pragma unroll
        for (int j = 0; j < TALL; ++j) {
            const int out = first + j * 16 + r;
            if (out >= d_model || token >= left) return;
            const float found = total[j] + (bias ? value_of<HALF>(bias[out]) : 0.f);
            y[(long)(tile * 8 + token) * d_model + out] = bits_of<HALF>(found);
        }
    });
}
