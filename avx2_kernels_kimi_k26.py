"""What the kernels take from AVX-512, for processors with AVX2 only: a vector of sixteen floats is two of eight.

The names are those of the intrinsics, in the kernels' namespace, where they hide the processor's own. Each does for all values
what the kernels ask of it: masks of loads and stores mostly have no gaps, and rare permutations go through memory. Products of
pairs in bfloat16 are two fused ones in float32; their sums differ from AVX-512's in the last bits. What only the kernels of
`bfloat16_kernels_kimi_k26` ask for is here too: compiled with `BFLOAT16_PRODUCTS`, they can be tested anywhere.
"""

AVX2 = r"""
#ifdef __AVX512BF16__  // such processors multiply bytes too (VNNI)
#define BFLOAT16_PRODUCTS
enum { REGISTERS = 32 };  // vectors that the processor holds at once
static inline void keep(__m512i& a) { asm("" : "+v"(a)); }
#else
enum { REGISTERS = 8 };

#undef _mm512_setr_epi32
#undef _mm512_setr_epi64
#undef _mm512_setr_ps

struct __m512 { __m256 low, high; };
struct __m512i { __m256i low, high; };
struct __m512d { __m256d low, high; };
typedef __m512i __m512bh;

#define INLINE static inline __attribute__((always_inline))

INLINE void keep(__m512i& a) { asm("" : "+x"(a.low), "+x"(a.high)); }

// What is done to both halves alike.
#define FLOATS2(name) \
    INLINE __m512 _mm512_##name(__m512 a, __m512 b) { return {_mm256_##name(a.low, b.low), _mm256_##name(a.high, b.high)}; }
#define FLOATS3(name) \
    INLINE __m512 _mm512_##name(__m512 a, __m512 b, __m512 c) { \
        return {_mm256_##name(a.low, b.low, c.low), _mm256_##name(a.high, b.high, c.high)}; \
    }
#define INTS2(name, as) \
    INLINE __m512i _mm512_##name(__m512i a, __m512i b) { return {_mm256_##as(a.low, b.low), _mm256_##as(a.high, b.high)}; }
#define SHIFT(name, kind) \
    INLINE __m512i _mm512_##name(__m512i a, kind n) { return {_mm256_##name(a.low, n), _mm256_##name(a.high, n)}; }
FLOATS2(add_ps) FLOATS2(sub_ps) FLOATS2(mul_ps) FLOATS2(div_ps) FLOATS2(max_ps) FLOATS2(unpacklo_ps) FLOATS2(unpackhi_ps)
FLOATS3(fmadd_ps) FLOATS3(fnmadd_ps)
INTS2(add_epi16, add_epi16) INTS2(add_epi32, add_epi32) INTS2(max_epi32, max_epi32) INTS2(or_si512, or_si256) INTS2(and_si512, and_si256)
INTS2(unpacklo_epi16, unpacklo_epi16) INTS2(unpackhi_epi16, unpackhi_epi16) INTS2(unpacklo_epi32, unpacklo_epi32)
INTS2(unpackhi_epi32, unpackhi_epi32) INTS2(unpacklo_epi64, unpacklo_epi64) INTS2(unpackhi_epi64, unpackhi_epi64)
SHIFT(slli_epi32, int) SHIFT(srai_epi32, int) SHIFT(srli_epi16, int) SHIFT(srl_epi32, __m128i)
INLINE __m512d _mm512_unpacklo_pd(__m512d a, __m512d b) { return {_mm256_unpacklo_pd(a.low, b.low), _mm256_unpacklo_pd(a.high, b.high)}; }
INLINE __m512d _mm512_unpackhi_pd(__m512d a, __m512d b) { return {_mm256_unpackhi_pd(a.low, b.low), _mm256_unpackhi_pd(a.high, b.high)}; }

// The same bits as another kind.
INLINE __m512 _mm512_castsi512_ps(__m512i a) { return {_mm256_castsi256_ps(a.low), _mm256_castsi256_ps(a.high)}; }
INLINE __m512i _mm512_castps_si512(__m512 a) { return {_mm256_castps_si256(a.low), _mm256_castps_si256(a.high)}; }
INLINE __m512d _mm512_castps_pd(__m512 a) { return {_mm256_castps_pd(a.low), _mm256_castps_pd(a.high)}; }
INLINE __m512 _mm512_castpd_ps(__m512d a) { return {_mm256_castpd_ps(a.low), _mm256_castpd_ps(a.high)}; }
INLINE __m512i _mm512_castsi128_si512(__m128i a) { return {_mm256_zextsi128_si256(a), _mm256_setzero_si256()}; }

// One value for all lanes, or each its own.
INLINE __m512 _mm512_set1_ps(float a) { return {_mm256_set1_ps(a), _mm256_set1_ps(a)}; }
INLINE __m512i _mm512_set1_epi32(int a) { return {_mm256_set1_epi32(a), _mm256_set1_epi32(a)}; }
INLINE __m512i _mm512_set1_epi16(short a) { return {_mm256_set1_epi16(a), _mm256_set1_epi16(a)}; }
INLINE __m512 _mm512_setzero_ps() { return {_mm256_setzero_ps(), _mm256_setzero_ps()}; }
INLINE __m512i _mm512_setzero_si512() { return {_mm256_setzero_si256(), _mm256_setzero_si256()}; }
INLINE __m512i _mm512_broadcast_i64x4(__m256i a) { return {a, a}; }
template <class... A> INLINE __m512i together(A... a) {
    const std::common_type_t<A...> all[] = {a...};
    return {_mm256_loadu_si256((const __m256i*)all), _mm256_loadu_si256((const __m256i*)all + 1)};
}
template <class... A> INLINE __m512i _mm512_setr_epi32(A... a) { return together(a...); }
template <class... A> INLINE __m512i _mm512_setr_epi64(A... a) { return together((long long)a...); }
template <class... A> INLINE __m512 _mm512_setr_ps(A... a) { return _mm512_castsi512_ps(together((float)a...)); }

// Memory.
INLINE __m512 _mm512_loadu_ps(const void* at) { return {_mm256_loadu_ps((const float*)at), _mm256_loadu_ps((const float*)at + 8)}; }
INLINE __m512i _mm512_loadu_si512(const void* at) { return {_mm256_loadu_si256((const __m256i*)at), _mm256_loadu_si256((const __m256i*)at + 1)}; }
INLINE __m512i _mm512_load_si512(const void* at) { return _mm512_loadu_si512(at); }
INLINE void _mm512_storeu_ps(void* at, __m512 a) { _mm256_storeu_ps((float*)at, a.low); _mm256_storeu_ps((float*)at + 8, a.high); }
INLINE void _mm512_store_ps(void* at, __m512 a) { _mm512_storeu_ps(at, a); }
INLINE void _mm512_storeu_si512(void* at, __m512i a) { _mm256_storeu_si256((__m256i*)at, a.low); _mm256_storeu_si256((__m256i*)at + 1, a.high); }
INLINE void _mm512_store_si512(void* at, __m512i a) { _mm512_storeu_si512(at, a); }
template <class Vector, class Value> static __attribute__((noinline)) Vector load_some(uint32_t there, const void* at) {
    Value all[sizeof(Vector) / sizeof(Value)] = {};
    for (int i = 0; there; i++, there >>= 1) if (there & 1) all[i] = ((const Value*)at)[i];
    Vector a;
    memcpy(&a, all, sizeof a);
    return a;
}
template <class Value, class Vector> static __attribute__((noinline)) void store_some(void* at, uint32_t there, const Vector& a) {
    Value all[sizeof(Vector) / sizeof(Value)];
    memcpy(all, &a, sizeof a);
    for (int i = 0; there; i++, there >>= 1) if (there & 1) ((Value*)at)[i] = all[i];
}
INLINE __m512i _mm512_maskz_loadu_epi16(__mmask32 there, const void* at) { return there == ~0u ? _mm512_loadu_si512(at) : load_some<__m512i, uint16_t>(there, at); }
INLINE __m512i _mm512_maskz_loadu_epi32(__mmask16 there, const void* at) { return there == 0xffff ? _mm512_loadu_si512(at) : load_some<__m512i, uint32_t>(there, at); }
INLINE __m512 _mm512_maskz_loadu_ps(__mmask16 there, const void* at) { return there == 0xffff ? _mm512_loadu_ps(at) : load_some<__m512, float>(there, at); }
INLINE __m256i _mm256_maskz_loadu_epi16(__mmask16 there, const void* at) {
    if (there == 0xffff) return _mm256_loadu_si256((const __m256i*)at);
    return there == 0xff ? _mm256_zextsi128_si256(_mm_loadu_si128((const __m128i*)at)) : load_some<__m256i, uint16_t>(there, at);
}
INLINE __m128i _mm_maskz_loadu_epi16(__mmask8 there, const void* at) { return there == 0xf ? _mm_loadl_epi64((const __m128i*)at) : load_some<__m128i, uint16_t>(there, at); }
INLINE void _mm512_mask_storeu_ps(void* at, __mmask16 there, __m512 a) { if (there == 0xffff) _mm512_storeu_ps(at, a); else store_some<float>(at, there, a); }
INLINE void _mm512_mask_storeu_epi32(void* at, __mmask16 there, __m512i a) { if (there == 0xffff) _mm512_storeu_si512(at, a); else store_some<uint32_t>(at, there, a); }
INLINE void _mm256_mask_storeu_epi16(void* at, __mmask16 there, __m256i a) { if (there == 0xffff) _mm256_storeu_si256((__m256i*)at, a); else store_some<uint16_t>(at, there, a); }

// Comparisons and what hangs on them.
#define _mm512_cmp_ps_mask(a, b, how) \
    ((__mmask16)(_mm256_movemask_ps(_mm256_cmp_ps((a).low, (b).low, how)) | _mm256_movemask_ps(_mm256_cmp_ps((a).high, (b).high, how)) << 8))
INLINE __mmask16 _mm512_cmple_epi32_mask(__m512i a, __m512i b) {
    const __m512i more = {_mm256_cmpgt_epi32(a.low, b.low), _mm256_cmpgt_epi32(a.high, b.high)};
    const __m512 bits = _mm512_castsi512_ps(more);
    return ~(_mm256_movemask_ps(bits.low) | _mm256_movemask_ps(bits.high) << 8);
}
INLINE __m512 _mm512_mask_mov_ps(__m512 a, __mmask16 where, __m512 b) {
    const __m256i bit = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
    const auto lanes_of = [&](int some) { return _mm256_castsi256_ps(_mm256_cmpeq_epi32(_mm256_and_si256(_mm256_set1_epi32(some), bit), bit)); };
    return {_mm256_blendv_ps(a.low, b.low, lanes_of(where)), _mm256_blendv_ps(a.high, b.high, lanes_of(where >> 8))};
}
INLINE __m512 _mm512_maskz_div_ps(__mmask16 where, __m512 a, __m512 b) { return _mm512_mask_mov_ps(_mm512_setzero_ps(), where, _mm512_div_ps(a, b)); }
INLINE float _mm512_reduce_add_ps(__m512 a) {
    const __m256 eight = _mm256_add_ps(a.low, a.high);
    __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
    four = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(four, _mm_movehdup_ps(four)));
}
INLINE int _mm512_reduce_min_epi32(__m512i a) {
    int all[16];
    _mm512_storeu_si512(all, a);
    return *std::min_element(all, all + 16);
}
INLINE int _mm512_reduce_max_epi32(__m512i a) {
    int all[16];
    _mm512_storeu_si512(all, a);
    return *std::max_element(all, all + 16);
}

// Numbers.
INLINE __m512i _mm512_cvtepu16_epi32(__m256i a) { return {_mm256_cvtepu16_epi32(_mm256_castsi256_si128(a)), _mm256_cvtepu16_epi32(_mm256_extracti128_si256(a, 1))}; }
INLINE __m512i _mm512_cvtepu8_epi32(__m128i a) { return {_mm256_cvtepu8_epi32(a), _mm256_cvtepu8_epi32(_mm_srli_si128(a, 8))}; }
INLINE __m256i narrow8(__m256 a) {  // bfloat16 in the lower half of each word: to nearest, ties to even
    const __m256i bits = _mm256_castps_si256(a), odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    const __m256i near = _mm256_srli_epi32(_mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7fff)), odd), 16);
    return _mm256_blendv_epi8(near, _mm256_set1_epi32(0x7fc0), _mm256_castps_si256(_mm256_cmp_ps(a, a, _CMP_UNORD_Q)));
}
INLINE __m256i _mm512_cvtneps_pbh(__m512 a) { return _mm256_permute4x64_epi64(_mm256_packus_epi32(narrow8(a.low), narrow8(a.high)), 0xd8); }
INLINE __m512bh _mm512_cvtne2ps_pbh(__m512 high, __m512 low) { return {_mm512_cvtneps_pbh(low), _mm512_cvtneps_pbh(high)}; }
INLINE __m256 first_of(__m256i pairs) { return _mm256_castsi256_ps(_mm256_slli_epi32(pairs, 16)); }
INLINE __m256 second_of(__m256i pairs) { return _mm256_castsi256_ps(_mm256_and_si256(pairs, _mm256_set1_epi32(0xffff0000))); }
INLINE __m256 add_pairs(__m256 sum, __m256i a, __m256i b) { return _mm256_fmadd_ps(second_of(a), second_of(b), _mm256_fmadd_ps(first_of(a), first_of(b), sum)); }
INLINE __m512 _mm512_dpbf16_ps(__m512 sum, __m512bh a, __m512bh b) { return {add_pairs(sum.low, a.low, b.low), add_pairs(sum.high, a.high, b.high)}; }
INLINE __m512i _mm512_cvtps_epi32(__m512 a) { return {_mm256_cvtps_epi32(a.low), _mm256_cvtps_epi32(a.high)}; }
INLINE __m512 _mm512_cvtepi32_ps(__m512i a) { return {_mm256_cvtepi32_ps(a.low), _mm256_cvtepi32_ps(a.high)}; }
INLINE __m128i _mm512_cvtepi32_epi8(__m512i a) {
    int32_t words[16];
    uint8_t bytes[16];
    memcpy(words, &a, sizeof words);
    for (int i = 0; i < 16; i++) bytes[i] = words[i];
    return _mm_loadu_si128((const __m128i*)bytes);
}
INLINE __m256i add_bytes(__m256i sum, __m256i a, __m256i b) {  // a's are from 0 to 15: two products fit sixteen bits
    return _mm256_add_epi32(sum, _mm256_madd_epi16(_mm256_maddubs_epi16(a, b), _mm256_set1_epi16(1)));
}
INLINE __m512i _mm512_dpbusd_epi32(__m512i sum, __m512i a, __m512i b) { return {add_bytes(sum.low, a.low, b.low), add_bytes(sum.high, a.high, b.high)}; }
INLINE __m256 whole(__m256 a) { return _mm256_floor_ps(_mm256_min_ps(_mm256_set1_ps(254), a)); }  // as far as a float can be two to it; NaN stays
INLINE __m256 rest(__m256 a) { return _mm256_sub_ps(_mm256_min_ps(_mm256_set1_ps(254), a), whole(a)); }
INLINE __m512 _mm512_reduce_ps(__m512 a, int) { return {rest(a.low), rest(a.high)}; }  // towards -inf
INLINE __m512 _mm512_mul_round_ps(__m512 a, __m512 b, int) {
    __m512 product = _mm512_mul_ps(a, b);
    asm("" : "+x"(product.low), "+x"(product.high));  // or what is added would be fused with it
    return product;
}
INLINE __m256 power(__m256 a, __m256 x) {  // a times 2^n for the whole part of x: in two steps, as one alone may be out of range
    const __m256i n = _mm256_cvtps_epi32(whole(x)), half = _mm256_srai_epi32(n, 1);
    const auto as_float = [](__m256i n) { return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(n, _mm256_set1_epi32(127)), 23)); };
    return _mm256_mul_ps(_mm256_mul_ps(a, as_float(half)), as_float(_mm256_sub_epi32(n, half)));
}
INLINE __m512 _mm512_scalef_ps(__m512 a, __m512 n) { return {power(a.low, n.low), power(a.high, n.high)}; }
INLINE __m512i _mm512_ternarylogic_epi32(__m512i a, __m512i b, __m512i c, int) { return _mm512_or_si512(_mm512_and_si512(a, b), c); }  // (a & b) | c alone

// Lanes that change places: two orders of quarters, and whatever else through memory.
INLINE __m512i _mm512_shuffle_i32x4(__m512i a, __m512i b, int order) {
    if (order == 0x88) return {_mm256_permute2x128_si256(a.low, a.high, 0x20), _mm256_permute2x128_si256(b.low, b.high, 0x20)};
    return {_mm256_permute2x128_si256(a.low, a.high, 0x31), _mm256_permute2x128_si256(b.low, b.high, 0x31)};  // 0xdd
}
INLINE __m512 _mm512_shuffle_f32x4(__m512 a, __m512 b, int order) {
    return _mm512_castsi512_ps(_mm512_shuffle_i32x4(_mm512_castps_si512(a), _mm512_castps_si512(b), order));
}
template <class Value, class Vector, class Index, size_t N> INLINE Vector picked(const Index& index, const Vector (&from)[N]) {
    constexpr int COUNT = sizeof(Vector) / sizeof(Value);
    Value all[N * COUNT], one[COUNT], at[COUNT];
    memcpy(all, from, sizeof from);
    memcpy(at, &index, sizeof index);
    for (int i = 0; i < COUNT; i++) one[i] = all[at[i] % (N * COUNT)];
    Vector to;
    memcpy(&to, one, sizeof to);
    return to;
}
INLINE __m256i _mm256_permutexvar_epi16(__m256i index, __m256i a) { return picked<uint16_t, __m256i>(index, {a}); }
INLINE __m512i _mm512_permutexvar_epi16(__m512i index, __m512i a) { return picked<uint16_t, __m512i>(index, {a}); }
INLINE __m512i _mm512_permutex2var_epi16(__m512i a, __m512i index, __m512i b) { return picked<uint16_t, __m512i>(index, {a, b}); }
INLINE __m512 _mm512_permutex2var_ps(__m512 a, __m512i index, __m512 b) {
    return _mm512_castsi512_ps(picked<uint32_t, __m512i>(index, {_mm512_castps_si512(a), _mm512_castps_si512(b)}));
}
// Of eight values at most, into the upper half of each word, where the mask 0xaaaaaaaa has them.
INLINE __m512i _mm512_maskz_permutexvar_epi16(__mmask32, __m512i index, __m512i a) {
    const __m256i table = _mm256_broadcastsi128_si256(_mm256_castsi256_si128(a.low)), none = _mm256_set1_epi32(0x01008080);
    const auto looked_up = [&](__m256i some) {  // two bytes for each value; nothing for the lower halves, whose index is 0
        return _mm256_shuffle_epi8(table, _mm256_add_epi16(_mm256_mullo_epi16(some, _mm256_set1_epi16(0x0202)), none));
    };
    return {looked_up(index.low), looked_up(index.high)};
}
#endif
"""
