/*
 * One sequence as an engine feeds it to the library, step by step, and what attention over it must come to: a
 * naive reference in double precision over pages as kakeya_open reads them and raw tokens as they were passed.
 */

#ifndef KAKEYA_TESTS_SEQUENCE_H
#define KAKEYA_TESTS_SEQUENCE_H

#include "world.h"

/* Writes tokens first..end-1 of a world that began at position 0, with slots of open_blocks for the blocks that
 * they leave or find partial. */
kakeya_status sequence_write(world *w, uint32_t first, uint32_t end);

/* Attention of the same tokens, into their rows of out and lse. */
kakeya_status sequence_attend(world *w, uint32_t first, uint32_t end, uint32_t flags);

/* The naive reference of that call; out [end-first][Q_HEADS][HEAD_DIM], lse [end-first][Q_HEADS]. */
void sequence_reference(const world *w, uint32_t first, uint32_t end, uint32_t flags, double *out, double *lse);

#endif
