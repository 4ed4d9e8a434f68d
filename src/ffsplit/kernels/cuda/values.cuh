// Halves as bit patterns, and activations: what the sources of this folder share. It is put in front of each of them.

typedef unsigned int u32;
typedef unsigned short u16;
typedef unsigned char u8;

enum { IDENTITY, SILU, GELU, GELU_TANH, RELU, RELU_SQUARED };

__device__ __forceinline__ float half_value(u16 bits) {
    float value;
    asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(bits));
    return value;
}

__device__ __forceinline__ u32 half_of(u32 count) {  // up to 2048, exact
    u16 bits;
    asm("cvt.rn.f16.u16 %0, %1;" : "=h"(bits) : "h"((u16)count));
    return bits;
}

template <bool HALF> __device__ __forceinline__ float value_of(u16 bits) {
    return HALF ? half_value(bits) : __uint_as_float((u32)bits << 16);
}

template <bool HALF> __device__ __forceinline__ u16 bits_of(float value) {
    u16 bits;
    if (HALF) asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(value));
    else asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(bits) : "f"(value));
    return bits;
}

template <int ACT> __device__ __forceinline__ float activated(float v) {
    if constexpr (ACT == SILU) return v / (1.f + __expf(-v));
    if constexpr (ACT == GELU) return 0.5f * v * (1.f + erff(v * 0.70710678118654752f));
    if constexpr (ACT == GELU_TANH) return v / (1.f + __expf(-1.5957691216057308f * (v + 0.044715f * v * v * v)));
    if constexpr (ACT == RELU) return v < 0.f ? 0.f : v;  // a NaN stays one
    if constexpr (ACT == RELU_SQUARED) return v < 0.f ? 0.f : v * v;
    return v;
}
