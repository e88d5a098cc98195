/* Loops that read memory, by a compiler that has nothing to do with Numba: what the read probe is compared with. */
#include <stddef.h>
#include <stdint.h>

/* Plain: the hardware prefetches. */
int64_t plain(const int64_t *words, size_t count) {
    int64_t sum = 0;
    for (size_t i = 0; i < count; i++) sum += words[i];
    return sum;
}

/* As attention reads K and V: blocks of 16 KiB from either half in turn, each line asked for four times. */
int64_t two_blocks(const int64_t *words, size_t count) {
    typedef int64_t vector __attribute__((vector_size(64), aligned(8)));
    enum { LINE = 8, BLOCK = 2048, STEP = 512 };
    size_t half = count / 2 / LINE * LINE;
    vector sums = {0};
    for (size_t block = 0; block < half; block += BLOCK)
        for (int second = 0; second < 2; second++)
            for (size_t i = block; i < block + BLOCK && i < half; i += LINE) {
                const int64_t *line = words + second * half + i;
                for (int chance = 4; chance; chance--) __builtin_prefetch(line + chance * STEP, 0, 2);
                sums += *(const vector *)line;
            }
    int64_t sum = 0;
    for (int lane = 0; lane < LINE; lane++) sum += sums[lane];
    for (size_t i = 2 * half; i < count; i++) sum += words[i];
    return sum;
}
