// What a training step does between its large products, on a processor and in bfloat16: attention over the segments
// of a pack, root-mean-square norms, gated units and rotary embeddings, forward and backward. `kernels.py` builds and
// calls them; each says its equation and is tested against it.
//
// Numbers are stored in bfloat16 and computed in float32, sixteen at a time. Products take bfloat16 in pairs, as
// processors multiply them (vdpbf16ps): both numbers of a pair stand next to each other, and are summed over.

#include <omp.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>
#ifdef __AVX512BF16__
#include <immintrin.h>
#endif

using bf16 = uint16_t;
using pair = uint32_t;  // two bf16, the first one in the lower half
constexpr int LANES = 16;
using f32s = float __attribute__((vector_size(64)));
using u32s = uint32_t __attribute__((vector_size(64)));
using i32s = int32_t __attribute__((vector_size(64)));
using bf16s = bf16 __attribute__((vector_size(32)));
static const i32s LANE = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};

template <class To, class From>
static inline To as(const From& from) {
    static_assert(sizeof(To) == sizeof(From));
    To to;
    memcpy(&to, &from, sizeof(To));
    return to;
}

template <class Vector, class Number>
static inline Vector read(const Number* from) {
    Vector v;
    memcpy(&v, from, sizeof(v));
    return v;
}

static inline f32s all(float x) { return f32s{} + x; }
static inline f32s floats(const bf16* x) { return as<f32s>(__builtin_convertvector(read<bf16s>(x), u32s) << 16); }

static inline void write(float* to, f32s x) { memcpy(to, &x, sizeof(x)); }

static inline void write(bf16* to, f32s x) {  // rounded to the nearest, to even where two are as near
#ifdef __AVX512BF16__
    const bf16s y = as<bf16s>(_mm512_cvtneps_pbh(as<__m512>(x)));
#else
    const u32s bits = as<u32s>(x);
    const u32s nearest = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    const bf16s y = __builtin_convertvector(x == x ? nearest : (bits >> 16) | 0x40, bf16s);  // not a number stays so
#endif
    memcpy(to, &y, sizeof(y));
}

static inline f32s dot(f32s sum, u32s a, u32s b) {
#ifdef __AVX512BF16__
    return as<f32s>(_mm512_dpbf16_ps(as<__m512>(sum), as<__m512bh>(a), as<__m512bh>(b)));
#else
    sum += as<f32s>(a << 16) * as<f32s>(b << 16);
    return sum + as<f32s>(a & 0xffff0000) * as<f32s>(b & 0xffff0000);
#endif
}

// Lane by lane a number of a (0 .. 15) or of b (16 .. 31)
static inline u32s chosen(u32s a, u32s b, i32s lanes) {
#ifdef __clang__
    u32s c{};
    for (int i = 0; i < LANES; i++) c[i] = lanes[i] < LANES ? a[lanes[i]] : b[lanes[i] - LANES];
    return c;
#else
    return __builtin_shuffle(a, b, as<u32s>(lanes));
#endif
}

static inline float sum(f32s x) {
    float total = 0;
    for (int i = 0; i < LANES; i++) total += x[i];
    return total;
}

static inline float largest(f32s x) {
    float most = x[0];
    for (int i = 1; i < LANES; i++) most = std::max(most, x[i]);
    return most;
}

// e^x for x in -87 .. 88, the nearest of these elsewhere; what is not a number stays so. e^x = 2^n e^r with r within
// ln 2 / 2 of 0, and for e^r a polynomial (Cephes' expf), good to the last place or two of float32.
static inline f32s exponential(f32s x) {
    x = x < -87.0f ? all(-87.0f) : x;
    x = x > 88.0f ? all(88.0f) : x;
    const f32s shifted = x * 1.44269504f + 12582912.0f;  // 1.5 * 2^23 has no place for a fraction: n in the lowest bits
    const f32s n = shifted - 12582912.0f;
    const f32s r = x - n * 0.693359375f + n * 2.12194440e-4f;  // ln 2 in two parts, the first exact
    f32s p = r * 1.9875691500e-4f + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    return as<f32s>(as<u32s>(p) + (as<u32s>(shifted) << 23));
}

static int up_to(int n, int multiple) { return (n + multiple - 1) / multiple * multiple; }

template <class T>
using Room = std::unique_ptr<T[], decltype(&std::free)>;

template <class T>
static Room<T> room(long n) {  // as it comes, not zero
    return {static_cast<T*>(std::aligned_alloc(64, (n * sizeof(T) / 64 + 1) * 64)), &std::free};
}

// Products of small matrices ------------------------------------------------------------------------------------------

struct Pairs {  // a matrix of pairs: (row, k) stands at [row * by_row + k * by_k]
    const pair* at;
    long by_row, by_k;
};

static Pairs in_rows(const bf16* at, long by_row) { return {reinterpret_cast<const pair*>(at), by_row / 2, 1}; }

// R rows and V * 16 columns of a product, which stay in registers
template <int R, int V>
static void block(Pairs a, const pair* b, long b_row, float* c, long c_row, int K, bool add) {
    f32s sums[R][V];
    for (int r = 0; r < R; r++)
        for (int v = 0; v < V; v++) sums[r][v] = add ? read<f32s>(c + r * c_row + v * LANES) : f32s{};
    for (int k = 0; k < K; k++) {
        u32s columns[V];
        for (int v = 0; v < V; v++) columns[v] = read<u32s>(b + k * b_row + v * LANES);
        for (int r = 0; r < R; r++) {
            const u32s row = u32s{} + a.at[r * a.by_row + k * a.by_k];
            for (int v = 0; v < V; v++) sums[r][v] = dot(sums[r][v], row, columns[v]);
        }
    }
    for (int r = 0; r < R; r++)
        for (int v = 0; v < V; v++) write(c + r * c_row + v * LANES, sums[r][v]);
}

template <int V>
static void strip(int rows, Pairs a, const pair* b, long b_row, float* c, long c_row, int K, bool add) {
    const auto down = [&](auto block_of, int R) {
        for (; rows >= R; rows -= R, a.at += R * a.by_row, c += R * c_row) block_of(a, b, b_row, c, c_row, K, add);
    };
    if (V == 1) down(block<12, V>, 12);  // products take some cycles: a processor wants a dozen of them under way
    down(block<6, V>, 6);
    down(block<2, V>, 2);
    down(block<1, V>, 1);
}

// c [rows, columns] = (with `add`, +=) the sum over K of a(row, k) . b [K, columns]; columns in sixteens
static void product(int rows, int columns, int K, Pairs a, const pair* b, long b_row, float* c, long c_row,
                    bool add = false) {
    int n = 0;
    for (; n + 4 * LANES <= columns; n += 4 * LANES) strip<4>(rows, a, b + n, b_row, c + n, c_row, K, add);
    const auto rest = (columns - n) / LANES == 3 ? strip<3> : (columns - n) / LANES == 2 ? strip<2> : strip<1>;
    if (n < columns) rest(rows, a, b + n, b_row, c + n, c_row, K, add);
}

// Attention -----------------------------------------------------------------------------------------------------------

struct Heads {  // bf16 (head, token, D): a row of D numbers at [head * by_head + token * by_token]
    bf16* at;
    long by_head, by_token;
    bf16* row(int head, int token) const { return at + head * by_head + token * by_token; }
};

struct Shape {
    int queries, keys;  // tokens of the pack; the same and what stands before all of them
    int H, G, D;        // heads of queries, heads of keys and values, numbers of each
    float scale;
    int threads;
};

struct Segment {  // `length` queries from `start`; they see all of `keys` keys but those of their own that come later
    int start, length, keys, ranges;
    const int* range;  // [2 * ranges]: where the keys stand, from and to
};

constexpr int QUERIES = 48;  // at a time: their scores stay in the cache for the next pass, products are not flat

static int most_keys(const Segment* segments, int count) {
    int most = 0;
    for (int n = 0; n < count; n++) most = std::max(most, up_to(segments[n].keys, LANES));
    return most;
}

template <class Do>
static void each_key(const Segment& s, Do work) {
    int n = 0;
    for (int r = 0; r < s.ranges; r++)
        for (int key = s.range[2 * r]; key < s.range[2 * r + 1]; key++) work(n++, key);
}

// Two rows of n numbers -> n pairs
static void zip(const bf16* first, const bf16* second, int n, pair* to) {
    for (int i = 0; i < n; i++) to[i] = first[i] | static_cast<pair>(second[i]) << 16;
}

// A row and zeros
static void zip(const bf16* row, int n, pair* to) { std::copy(row, row + n, to); }

// Rows under each other [count, n], count even or a row of zeros more -> [count / 2, n] pairs of neighbouring rows
static void zip_rows(const bf16* rows, long by_row, int count, int n, pair* to) {
    for (int i = 0; i + 1 < count; i += 2) zip(rows + i * by_row, rows + (i + 1) * by_row, n, to + i / 2 * n);
    if (count % 2) zip(rows + (count - 1) * by_row, n, to + count / 2 * n);
}

// The S keys of a segment [S, D], zeros up to `padded` -> [D / 2, padded]: pairs along D, to sum over D
static void over_D(const Segment& s, Heads t, int head, int D, int padded, pair* to) {
    each_key(s, [&](int n, int key) {
        const bf16* row = t.row(head, key);
        for (long d = 0; d < D / 2; d++) to[d * padded + n] = read<pair>(row + 2 * d);
    });
    for (long d = 0; d < D / 2; d++) std::fill(to + d * padded + s.keys, to + (d + 1) * padded, 0);
}

// The same -> [padded / 2, D]: pairs of neighbouring keys, to sum over keys
static void over_keys(const Segment& s, Heads t, int head, int D, int padded, pair* to) {
    const bf16* before = nullptr;
    each_key(s, [&](int n, int key) {
        const bf16* row = t.row(head, key);
        if (n % 2) zip(before, row, D, to + n / 2 * D);
        before = row;
    });
    if (s.keys % 2) zip(before, D, to + s.keys / 2 * D);
    std::fill(to + (s.keys + 1) / 2 * D, to + padded / 2 * D, 0);
}

// Some queries of a segment, in one of the heads that share their keys: `rows` of them from `start`, the first behind
// `before` keys, none of which sees more than `seen`
struct Queries {
    int head, start, rows, before, seen;
};

template <class Do>
static void each_queries(const Segment& s, int g, int group, Do work) {
    for (int head = g * group; head < (g + 1) * group; head++)
        for (int first = 0; first < s.length; first += QUERIES) {
            const int rows = std::min(QUERIES, s.length - first), before = s.keys - s.length + first;
            work(Queries{head, s.start + first, rows, before, up_to(before + rows, LANES)});
        }
}

// Each of these rows times all keys (or values) that are seen: [rows, padded]
static void on_keys(const Queries& some, Heads t, const pair* keys, int D, int padded, float* to) {
    const Pairs rows = in_rows(t.row(some.head, some.start), t.by_token);
    product(some.rows, some.seen, D / 2, rows, keys, padded, to, padded);
}

// out = P v for P = softmax(scale q k^T) over the keys that each query sees. log_sums [H, queries]: the log of the sum
// of exp(scale q k^T), by which the backward pass has P again
extern "C" void attend(Heads q, Heads k, Heads v, Heads out, float* log_sums, Shape shape, const Segment* segments,
                       int count) {
    const int G = shape.G, D = shape.D, group = shape.H / G, most = most_keys(segments, count);
#pragma omp parallel num_threads(shape.threads)
    {
        const auto keys = room<pair>(most * D / 2), values = room<pair>(most * D / 2);
        const auto scores = room<float>(QUERIES * most), made = room<float>(QUERIES * D), sums = room<float>(QUERIES);
        const auto P = room<bf16>(QUERIES * most);
#pragma omp for schedule(static, 1)
        for (int task = 0; task < count * G; task++) {
            const Segment& s = segments[task / G];
            const int g = task % G, padded = up_to(s.keys, LANES);
            over_D(s, k, g, D, padded, keys.get());
            over_keys(s, v, g, D, padded, values.get());
            each_queries(s, g, group, [&](const Queries& some) {
                on_keys(some, q, keys.get(), D, padded, &scores[0]);
                for (int i = 0; i < some.rows; i++) {
                    const float* score = &scores[i * padded];
                    const int own = some.before + i + 1;
                    f32s tops = all(-INFINITY), total{};
                    for (int j = 0; j < own; j += LANES) {
                        const f32s x = read<f32s>(score + j);
                        tops = (LANE < own - j) & (x > tops) ? x : tops;
                    }
                    const float top = largest(tops);
                    for (int j = 0; j < some.seen; j += LANES) {
                        const f32s p = exponential((read<f32s>(score + j) - top) * shape.scale);
                        const f32s shown = LANE < own - j ? p : f32s{};
                        total += shown;
                        write(&P[i * padded + j], shown);
                    }
                    sums[i] = sum(total);
                    log_sums[some.head * shape.queries + some.start + i] = top * shape.scale + std::log(sums[i]);
                }
                product(some.rows, D, some.seen / 2, in_rows(P.get(), padded), values.get(), D, &made[0], D);
                for (int i = 0; i < some.rows; i++)
                    for (int d = 0; d < D; d += LANES)
                        write(out.row(some.head, some.start + i) + d, read<f32s>(&made[i * D + d]) / sums[i]);
            });
        }
    }
}

// With dP = dO v^T and dS = scale P (dP - the sum of P dP over keys): dq = dS k, dk = dS^T q, dv = P^T dO. What several
// segments and heads add to dk and dv [keys, G, D] is summed in float32, by thread and then in the order of threads, so
// that a number of threads has one result
extern "C" void attend_backward(Heads dO, Heads q, Heads k, Heads v, const float* log_sums, Heads dq, bf16* dk,
                                bf16* dv, Shape shape, const Segment* segments, int count) {
    const int G = shape.G, D = shape.D, group = shape.H / G, most = most_keys(segments, count);
    const long size = static_cast<long>(shape.keys) * G * D;
    const auto by_thread = room<float>(2 * size * shape.threads);
#pragma omp parallel num_threads(shape.threads)
    {
        float* all_dk = &by_thread[2 * size * omp_get_thread_num()];
        std::fill(all_dk, all_dk + 2 * size, 0.0f);
        const auto keys = room<pair>(most * D / 2), values = room<pair>(most * D / 2), keys_ = room<pair>(most * D / 2);
        const auto queries_ = room<pair>(QUERIES * D / 2), dO_ = room<pair>(QUERIES * D / 2);
        const auto P_ = room<pair>(QUERIES * most / 2), dS_ = room<pair>(QUERIES * most / 2);
        const auto P = room<bf16>(QUERIES * most), dS = room<bf16>(QUERIES * most);
        const auto scores = room<float>(QUERIES * most), dP = room<float>(QUERIES * most);
        const auto made = room<float>(QUERIES * D);
        const auto sum_dk = room<float>(most * D), sum_dv = room<float>(most * D);
#pragma omp for schedule(static, 1)
        for (int task = 0; task < count * G; task++) {
            const Segment& s = segments[task / G];
            const int g = task % G, padded = up_to(s.keys, LANES);
            over_D(s, k, g, D, padded, keys.get());
            over_D(s, v, g, D, padded, values.get());
            over_keys(s, k, g, D, padded, keys_.get());
            std::fill(&sum_dk[0], &sum_dk[padded * D], 0.0f);
            std::fill(&sum_dv[0], &sum_dv[padded * D], 0.0f);
            each_queries(s, g, group, [&](const Queries& some) {
                const int rows = some.rows, seen = some.seen, pairs = (rows + 1) / 2;
                on_keys(some, q, keys.get(), D, padded, &scores[0]);
                on_keys(some, dO, values.get(), D, padded, &dP[0]);
                for (int i = 0; i < rows; i++) {
                    float *p = &scores[i * padded], *dp = &dP[i * padded];
                    const float log_sum = log_sums[some.head * shape.queries + some.start + i];
                    f32s total{};
                    for (int j = 0; j < seen; j += LANES) {
                        const f32s whole = exponential(read<f32s>(p + j) * shape.scale - log_sum);
                        const f32s shown = LANE < some.before + i + 1 - j ? whole : f32s{};
                        total += shown * read<f32s>(dp + j);
                        write(p + j, shown);
                        write(&P[i * padded + j], shown);
                    }
                    const float mean = sum(total);
                    for (int j = 0; j < seen; j += LANES)
                        write(&dS[i * padded + j], read<f32s>(p + j) * (read<f32s>(dp + j) - mean) * shape.scale);
                }
                product(rows, D, seen / 2, in_rows(dS.get(), padded), keys_.get(), D, &made[0], D);
                for (int i = 0; i < rows; i++)
                    for (int d = 0; d < D; d += LANES)
                        write(dq.row(some.head, some.start + i) + d, read<f32s>(&made[i * D + d]));
                zip_rows(P.get(), padded, rows, seen, P_.get());
                zip_rows(dS.get(), padded, rows, seen, dS_.get());
                zip_rows(q.row(some.head, some.start), q.by_token, rows, D, queries_.get());
                zip_rows(dO.row(some.head, some.start), dO.by_token, rows, D, dO_.get());
                product(seen, D, pairs, {dS_.get(), 1, seen}, queries_.get(), D, &sum_dk[0], D, true);
                product(seen, D, pairs, {P_.get(), 1, seen}, dO_.get(), D, &sum_dv[0], D, true);
            });
            each_key(s, [&](int n, int key) {
                float *to_dk = all_dk + (static_cast<long>(key) * G + g) * D, *to_dv = to_dk + size;
                for (int d = 0; d < D; d++) to_dk[d] += sum_dk[n * D + d], to_dv[d] += sum_dv[n * D + d];
            });
        }
#pragma omp for schedule(static)
        for (long i = 0; i < size; i += LANES) {
            f32s for_k{}, for_v{};
            for (int thread = 0; thread < omp_get_num_threads(); thread++) {
                for_k += read<f32s>(&by_thread[2 * size * thread + i]);
                for_v += read<f32s>(&by_thread[2 * size * thread + size + i]);
            }
            write(dk + i, for_k);
            write(dv + i, for_v);
        }
    }
}

// Frozen linear layers with low-rank factors --------------------------------------------------------------------------

constexpr int PANEL = 4 * LANES;      // columns of a product that are computed together, from one packed piece of W
constexpr int ROWS = 192, DEPTH = 512;  // rows and pairs of a piece of a product: what it needs stays in the cache

// One step of a transposition of sixteen rows of sixteen: the blocks of S that lie off the diagonal change places
template <int S>
static inline void exchange(u32s rows[LANES]) {
    const i32s first = (LANE & S) != 0 ? LANE + LANES - S : LANE, second = (LANE & S) != 0 ? LANE + LANES : LANE + S;
    for (int i = 0; i < LANES; i++)
        if (!(i & S)) {
            const u32s a = rows[i], b = rows[i + S];
            rows[i] = chosen(a, b, first);
            rows[i + S] = chosen(a, b, second);
        }
}

// Rows of a matrix, one a column of a product: [n, 2 K] -> [K, n] pairs, n in sixteens, to sum along the rows
static void pack_along(const bf16* rows, long by_row, int n, int K, pair* to) {
    for (int i = 0; i < n; i += LANES) {
        int k = 0;
        for (; k + LANES <= K; k += LANES) {
            u32s square[LANES];
            for (int row = 0; row < LANES; row++) square[row] = read<u32s>(rows + (i + row) * by_row + 2 * k);
            exchange<8>(square), exchange<4>(square), exchange<2>(square), exchange<1>(square);
            for (int row = 0; row < LANES; row++) memcpy(to + static_cast<long>(k + row) * n + i, &square[row], 64);
        }
        for (; k < K; k++)
            for (int row = i; row < i + LANES; row++)
                to[static_cast<long>(k) * n + row] = read<pair>(rows + row * by_row + 2 * k);
    }
}

// Columns of a matrix, one a column of a product: [2 K, n] -> [K, n] pairs, to sum down the columns
static void pack_down(const bf16* rows, long by_row, int n, int K, pair* to) { zip_rows(rows, by_row, 2 * K, n, to); }

struct Linear {  // x [tokens, d_in], W [d_out, d_in], A [r, d_in], B [d_out, r]; all but tokens in sixteens
    int tokens, d_in, d_out, r, threads;
};

// What this thread does of a number of rows: from .. to, in sixes as long as there are any. There may be fewer threads
// than were asked for
static void share(int rows, int* from, int* to) {
    const int threads = omp_get_num_threads(), each = up_to((rows + threads - 1) / threads, 6);
    *from = std::min(rows, omp_get_thread_num() * each), *to = std::min(rows, *from + each);
}

// y [from .. to, columns] = x . b + u . c for b [K, columns] and c [R, columns], which stand under each other in one piece
static void deep_product(const bf16* x, int K, const bf16* u, int R, int from, int to, int columns, const pair* b,
                         bf16* y, int by_row, float* sums) {
    for (int first = from; first < to; first += ROWS) {
        const int rows = std::min(ROWS, to - first);
        for (int k = 0; k < K; k += DEPTH)
            product(rows, columns, std::min(DEPTH, K - k), in_rows(x + first * 2L * K + 2 * k, 2 * K),
                    b + static_cast<long>(k) * columns, columns, sums, columns, k > 0);
        if (R)
            product(rows, columns, R, in_rows(u + first * 2L * R, 2 * R), b + static_cast<long>(K) * columns, columns,
                    sums, columns, true);
        for (int i = 0; i < rows; i++)
            for (int j = 0; j < columns; j += LANES)
                write(y + static_cast<long>(first + i) * by_row + j, read<f32s>(sums + i * columns + j));
    }
}

// u = x A^T [tokens, r], y = x W^T + u B^T
extern "C" void low_rank(const bf16* x, const bf16* W, const bf16* A, const bf16* B, bf16* u, bf16* y, Linear shape) {
    const int K = shape.d_in / 2, R = shape.r / 2, panels = (shape.d_out + PANEL - 1) / PANEL;
    const auto A_ = room<pair>(static_cast<long>(K) * shape.r), W_ = room<pair>(static_cast<long>(K + R) * shape.d_out);
#pragma omp parallel num_threads(shape.threads)
    {
        const auto sums = room<float>(ROWS * std::max(PANEL, shape.r));
#pragma omp for schedule(static)
        for (int panel = -1; panel < panels; panel++) {
            const int first = panel * PANEL, n = std::min(PANEL, shape.d_out - first);
            if (panel < 0) {
                pack_along(A, shape.d_in, shape.r, K, A_.get());
            } else {
                pair* to = &W_[static_cast<long>(K + R) * first];
                pack_along(W + static_cast<long>(first) * shape.d_in, shape.d_in, n, K, to);
                pack_along(B + static_cast<long>(first) * shape.r, shape.r, n, R, to + static_cast<long>(K) * n);
            }
        }
        int from, to;
        share(shape.tokens, &from, &to);
        deep_product(x, K, nullptr, 0, from, to, shape.r, A_.get(), u, shape.r, sums.get());
        for (int first = 0; first < shape.d_out; first += PANEL)
            deep_product(x, K, u, R, from, to, std::min(PANEL, shape.d_out - first),
                         &W_[static_cast<long>(K + R) * first], y + first, shape.d_out, sums.get());
    }
}

// c [r, columns] = a^T b over tokens, for a [tokens, r] as pairs of neighbouring tokens and b [tokens, columns]
static void over_tokens(const pair* a, const bf16* b, long by_row, int tokens, int r, int columns, float* c, long c_row,
                        pair* scratch) {
    for (int first = 0; first < tokens; first += 2 * DEPTH) {
        const int rows = std::min(2 * DEPTH, tokens - first);
        zip_rows(b + first * by_row, by_row, rows, columns, scratch);
        product(r, columns, (rows + 1) / 2, {a + static_cast<long>(first / 2) * r, 1, r}, scratch, columns, c, c_row,
                first > 0);
    }
}

// With du = dy B: dx = dy W + du A (unless null), dA [r, d_in] = du^T x, dB^T [r, d_out] = u^T dy (each unless null)
extern "C" void low_rank_backward(const bf16* dy, const bf16* x, const bf16* u, const bf16* W, const bf16* A,
                                  const bf16* B, bf16* dx, float* dA, float* dB, Linear shape) {
    const int K = shape.d_out / 2, R = shape.r / 2, r = shape.r, pairs = (shape.tokens + 1) / 2;
    const int panels = (shape.d_in + PANEL - 1) / PANEL;
    const auto B_ = room<pair>(static_cast<long>(K) * r), W_ = room<pair>(static_cast<long>(K + R) * shape.d_in);
    const auto du = room<bf16>(static_cast<long>(shape.tokens) * r);
    const auto du_ = room<pair>(static_cast<long>(pairs) * r), u_ = room<pair>(static_cast<long>(pairs) * r);
#pragma omp parallel num_threads(shape.threads)
    {
        const auto sums = room<float>(ROWS * std::max(PANEL, r));
        const auto scratch = room<pair>(DEPTH * PANEL);
#pragma omp for schedule(static)
        for (int panel = -1; panel < (dx ? panels : 0); panel++) {
            const int first = panel * PANEL, n = std::min(PANEL, shape.d_in - first);
            if (panel < 0) {
                pack_down(B, r, r, K, B_.get());
            } else {
                pair* to = &W_[static_cast<long>(K + R) * first];
                pack_down(W + first, shape.d_in, n, K, to);
                pack_down(A + first, shape.d_in, n, R, to + static_cast<long>(K) * n);
            }
        }
        int from, to;
        share(shape.tokens, &from, &to);
        deep_product(dy, K, nullptr, 0, from, to, r, B_.get(), du.get(), r, sums.get());
        for (int first = 0; dx && first < shape.d_in; first += PANEL)
            deep_product(dy, K, du.get(), R, from, to, std::min(PANEL, shape.d_in - first),
                         &W_[static_cast<long>(K + R) * first], dx + first, shape.d_in, sums.get());
#pragma omp barrier
#pragma omp for schedule(static)
        for (int token = 0; token < shape.tokens; token += 2) {
            const int rows = std::min(2, shape.tokens - token);
            zip_rows(du.get() + static_cast<long>(token) * r, r, rows, r, &du_[static_cast<long>(token / 2) * r]);
            zip_rows(u + static_cast<long>(token) * r, r, rows, r, &u_[static_cast<long>(token / 2) * r]);
        }
#pragma omp for schedule(static) nowait
        for (int first = 0; first < (dA ? shape.d_in : 0); first += PANEL)
            over_tokens(du_.get(), x + first, shape.d_in, shape.tokens, r, std::min(PANEL, shape.d_in - first),
                        dA + first, shape.d_in, scratch.get());
#pragma omp for schedule(static)
        for (int first = 0; first < (dB ? shape.d_out : 0); first += PANEL)
            over_tokens(u_.get(), dy + first, shape.d_out, shape.tokens, r, std::min(PANEL, shape.d_out - first),
                        dB + first, shape.d_out, scratch.get());
    }
}

// Passes over memory --------------------------------------------------------------------------------------------------

// y = gain x / sqrt(mean(x^2) + eps) over rows of d
extern "C" void rms_norm(const bf16* x, const bf16* gain, bf16* y, long rows, int d, float eps, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (long row = 0; row < rows; row++) {
        const bf16* x_ = x + row * d;
        f32s squares{};
        for (int i = 0; i < d; i += LANES) squares += floats(x_ + i) * floats(x_ + i);
        const float by = 1 / std::sqrt(sum(squares) / d + eps);
        for (int i = 0; i < d; i += LANES) write(y + row * d + i, floats(x_ + i) * by * floats(gain + i));
    }
}

// dx = by (u - x by^2 mean(u x)) for u = gain dy and by = 1 / sqrt(mean(x^2) + eps)
extern "C" void rms_norm_backward(const bf16* dy, const bf16* x, const bf16* gain, bf16* dx, long rows, int d,
                                  float eps, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (long row = 0; row < rows; row++) {
        const bf16 *x_ = x + row * d, *dy_ = dy + row * d;
        f32s squares{}, along{};
        for (int i = 0; i < d; i += LANES) {
            squares += floats(x_ + i) * floats(x_ + i);
            along += floats(x_ + i) * floats(dy_ + i) * floats(gain + i);
        }
        const float by = 1 / std::sqrt(sum(squares) / d + eps), back = by * by * sum(along) / d;
        for (int i = 0; i < d; i += LANES)
            write(dx + row * d + i, by * (floats(dy_ + i) * floats(gain + i) - floats(x_ + i) * back));
    }
}

// y = g sigmoid(g) up, over n numbers, n in sixteens
extern "C" void silu_gate(const bf16* gate, const bf16* up, bf16* y, long n, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (long i = 0; i < n; i += LANES) {
        const f32s g = floats(gate + i);
        write(y + i, g / (1 + exponential(-g)) * floats(up + i));
    }
}

// dgate = dy up s (1 + g (1 - s)), dup = dy g s, for s = sigmoid(g)
extern "C" void silu_gate_backward(const bf16* dy, const bf16* gate, const bf16* up, bf16* dgate, bf16* dup, long n,
                                   int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (long i = 0; i < n; i += LANES) {
        const f32s g = floats(gate + i), dy_ = floats(dy + i), s = 1 / (1 + exponential(-g));
        write(dgate + i, dy_ * floats(up + i) * s * (1 + g * (1 - s)));
        write(dup + i, dy_ * g * s);
    }
}

// Each head's numbers turned, n with n + D / 2: y = a cos - b sin, b cos + a sin. `back` turns the other way, which is
// the gradient. cos and sin [tokens, D]
extern "C" void rotate(Heads x, const bf16* cos, const bf16* sin, Heads y, int heads, int tokens, int D, bool back,
                       int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int t = 0; t < tokens; t++)
        for (int h = 0; h < heads; h++)
            for (int i = 0, j = D / 2; i < D / 2; i += LANES, j += LANES) {
                const bf16 *in = x.row(h, t), *c = cos + static_cast<long>(t) * D, *s = sin + static_cast<long>(t) * D;
                const f32s a = floats(in + i), b = floats(in + j);
                const f32s sin_a = back ? -floats(s + j) : floats(s + i), sin_b = back ? -floats(s + i) : floats(s + j);
                write(y.row(h, t) + i, a * floats(c + i) - b * sin_a);
                write(y.row(h, t) + j, b * floats(c + j) + a * sin_b);
            }
}
