/*
 * kakeya.h - a compressed KV cache for transformer inference: the C interface of libkakeya.
 *
 * Copyright the KAKEYA authors. Licence: Apache-2.0.
 *
 * Written by cbindgen from the sources of crates/ffi. Do not edit; regenerate with
 *     cargo run -p kakeya-ffi --example write_header
 *
 * ------------------------------------------------------------------------------------------------
 * What it does
 *
 * A model's keys and values are kept in blocks of 128 tokens. A block that is full is *sealed*: for
 * each KV head, K and V of its 128 tokens become one *page* of a fixed number of bytes, 4 to 6.4
 * times smaller than in bfloat16. Blocks that are not full yet stay raw in *open blocks*. Attention
 * reads pages and open blocks alike.
 *
 *     recipe ---+
 *     model  ---+--> kakeya_codec --> kakeya_write   a step's K, V --> open blocks, pages
 *     artefact -+                     kakeya_attend  a step's Q + pages + open blocks --> output
 *                                     kakeya_seal, kakeya_open   one block to pages and back
 *
 * A page stands alone: copied to another process, machine or file it means the same to any codec
 * with the same fingerprint (kakeya_codec_describe).
 *
 * In short (csrc/examples/seal_open.c is the same with its error paths):
 *
 *     kakeya_codec *codec = NULL;
 *     const char *recipe = "kakeya-free-4.6x";
 *     if (kakeya_codec_new(recipe, strlen(recipe), model, strlen(model), NULL, 0, &codec)) {
 *       fprintf(stderr, "%s\n", kakeya_last_error());
 *       return 1;
 *     }
 *     kakeya_seal_args args = {.struct_size = sizeof args, .layer = 0, .num_heads = 3, ...};
 *     if (kakeya_seal(codec, &args)) ...
 *     kakeya_codec_free(codec);
 *
 * ------------------------------------------------------------------------------------------------
 * Rules that hold for every function
 *
 * Errors. Functions return a kakeya_status; KAKEYA_OK is 0. All arguments are checked before anything
 *   is written: unless the status is OK, every output is as it was. Two exceptions: a text function
 *   that returns BUFFER_TOO_SMALL has set *needed, and after PANIC, which is a bug in this library,
 *   outputs may be written in part. kakeya_last_error() says what was wrong and what is valid.
 *   "Errors:" below lists the codes that are particular to a function; NULL_POINTER, MISALIGNED and
 *   PANIC can come from all of them, BAD_UTF8 and OVERFLOW from all that take texts or arrays.
 *
 * Ownership. The caller owns everything that it passes in, and nothing of it is kept after a call.
 *   The library owns what it returns: static texts for ever, kakeya_last_error() until the next call
 *   on the same thread, a codec until kakeya_codec_free.
 *
 * Memory. A pointer must point to as many elements as the arguments say, aligned to its element;
 *   they must be there and not be written by anyone else during the call. What is written must not
 *   overlap anything else that is passed (ALIASED); inputs may overlap each other. A strided tensor
 *   counts as the whole range from its first to its last byte, gaps included. An array of length 0
 *   may be NULL. A codec pointer must come from kakeya_codec_new and not be released yet: that, like
 *   a pointer to memory that is not there, cannot be checked.
 *
 * Structs. The caller sets struct_size to sizeof of the struct before the call; it is checked before
 *   any other field is read (BAD_STRUCT_SIZE).
 *
 * Texts. In: UTF-8, pointer and length in bytes, no terminating NUL needed. Out: buf takes UTF-8
 *   with a terminating NUL, *needed the bytes for that, NUL included. If cap is smaller, buf stays
 *   untouched and the status is BUFFER_TOO_SMALL; with buf NULL and cap 0 the call only asks for the
 *   size and returns OK. needed must not be NULL.
 *
 * Tensors. [a][b][c] means c innermost. The innermost dimension, head_dim, is contiguous. Strides of
 *   tensors are in elements, strides of pages in bytes; none may be negative. Rows of an output must
 *   lie apart. Pages may lie at any address.
 *
 * Heads and layers are counted in the whole model, from 0. A tensor-parallel rank passes the number
 *   of its first KV head as first_head.
 *
 * Threads. Every function may be called from any thread at any time, as long as no two calls write the
 *   same memory. By what they are called with:
 *     kakeya_codec        never changes after it was made: shared without locks. Only kakeya_codec_free
 *                         must come after every other call with it has returned, on whatever thread.
 *     kakeya_cuda         likewise. Launches that may run at the same time on the device need a plan,
 *                         a workspace and counters each; launches on one stream may share them.
 *     argument structs    copied at the start of a call; not kept.
 *     kakeya_last_error() per thread: a thread reads why its own last failed call failed.
 *     functions without a handle: no state that a caller could see.
 *   kakeya_write and kakeya_attend share their work among a pool of threads of the process, one for
 *   each processor unless RAYON_NUM_THREADS says otherwise; it starts with the first such call. A
 *   child of fork() has no such threads: it must not call these two if its parent did before the fork.
 *
 * Stability. Numbers of statuses and enumerators are frozen. A change in the meaning of a function
 *   or a struct raises KAKEYA_ABI_VERSION; additions do not.
 */

/* clang-format off */

#ifndef KAKEYA_H
#define KAKEYA_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

/* ---------------------------------------------------------------------------------------------- */
/* 1. Status and errors */

// What a call came to. Numbers are frozen: a number keeps its meaning in every later version.
enum {
  // Done.
  KAKEYA_OK = 0,
  // A pointer that must point to something is NULL.
  KAKEYA_ERR_NULL_POINTER = 1,
  // A pointer is not a multiple of the size of what it points to.
  KAKEYA_ERR_MISALIGNED = 2,
  // A buffer is shorter than what has to be written into it or read from it.
  KAKEYA_ERR_BUFFER_TOO_SMALL = 3,
  // Lengths and strides describe more bytes than an address space holds.
  KAKEYA_ERR_OVERFLOW = 4,
  // An index, a count, a position or a stride is outside its range.
  KAKEYA_ERR_OUT_OF_RANGE = 5,
  // struct_size is not the sizeof of the struct in this header.
  KAKEYA_ERR_BAD_STRUCT_SIZE = 6,
  // A text is not UTF-8.
  KAKEYA_ERR_BAD_UTF8 = 7,
  // A recipe is neither the name of a preset nor a valid recipe in JSON.
  KAKEYA_ERR_BAD_RECIPE = 8,
  // The description of the model is not valid.
  KAKEYA_ERR_BAD_MODEL = 9,
  // The calibration artefact is not one, or is damaged.
  KAKEYA_ERR_BAD_CALIBRATION = 10,
  // The recipe needs a calibration artefact and none was given.
  KAKEYA_ERR_CALIBRATION_REQUIRED = 11,
  // The calibration artefact belongs to another model or another recipe.
  KAKEYA_ERR_CALIBRATION_MISMATCH = 12,
  // Valid, but not something this version can do.
  KAKEYA_ERR_UNSUPPORTED = 13,
  // K or V contains a NaN, an infinity or a magnitude above 2^24 where a block is sealed.
  KAKEYA_ERR_NON_FINITE = 14,
  // The bytes of a page are not a page of this codec and layer.
  KAKEYA_ERR_BAD_PAGE = 15,
  // A block is only partly there and has no slot in open_blocks.
  KAKEYA_ERR_NO_OPEN_SLOT = 16,
  // Two arguments share memory, and one of them is written.
  KAKEYA_ERR_ALIASED = 17,
  // dtype is not a kakeya_dtype.
  KAKEYA_ERR_BAD_DTYPE = 18,
  // The library was built without CUDA kernels, or without ones for this GPU or shape.
  KAKEYA_ERR_NO_KERNELS = 19,
  // There is no CUDA driver, or it does not start.
  KAKEYA_ERR_NO_CUDA = 20,
  // The CUDA driver refused a call; the text says which and why.
  KAKEYA_ERR_CUDA = 21,
  // The caller, a page or a calibration artefact is of another version than this library.
  KAKEYA_ERR_WRONG_VERSION = 22,
  // A device that is not there, or memory that is not the device's.
  KAKEYA_ERR_WRONG_DEVICE = 23,
  // Pages of another recipe, model or artefact than the codec's: their fingerprints differ.
  KAKEYA_ERR_WRONG_RECIPE = 24,
  // A bug in this library. The process goes on; please report the text of kakeya_last_error().
  // The one status after which outputs may have been written in part.
  KAKEYA_ERR_PANIC = 99,
};
typedef int32_t kakeya_status;

// The name of a status, such as "KAKEYA_ERR_NULL_POINTER"; "KAKEYA_ERR_UNKNOWN" for a number that
// is no status. Static text, never NULL.
const char *kakeya_status_name(int32_t status);

// Why the last call that failed on this thread failed: UTF-8 text that names the argument, what
// was wrong with it and what is valid. "" if none failed yet; never NULL. A call that succeeds
// leaves the text as it is. The pointer is valid until the next call of this library on this
// thread.
const char *kakeya_last_error(void);

/* ---------------------------------------------------------------------------------------------- */
/* 2. Which library this is */

// Version of the ABI that this header describes. Raised when a function or a struct changes its
// meaning; functions, structs and status codes may be added without that.
#define KAKEYA_ABI_VERSION 1

// Tokens in a block. The page format and every function here count in blocks of this size.
#define KAKEYA_BLOCK_TOKENS 128

// The ABI version of the library that was loaded. Compare it with KAKEYA_ABI_VERSION of the header
// that you compiled against, and refuse the library if they differ.
uint32_t kakeya_abi_version(void);

// OK if this library serves a caller that was compiled against the header of this version: pass
// KAKEYA_ABI_VERSION. The first call of a program that loads the library at run time.
//
// Errors: WRONG_VERSION.
kakeya_status kakeya_require_abi(uint32_t version);

// The version of the library, such as "0.1.0". Static text.
const char *kakeya_version(void);

// Which instructions run-time dispatch chose on this machine: "avx512", "avx2" or "portable".
// Pages are the same bytes on all of them, attention the same up to rounding. KAKEYA_SIMD=portable or
// avx2 in the environment asks for less than the processor offers. Static text.
const char *kakeya_simd(void);

/* ---------------------------------------------------------------------------------------------- */
/* 3. Recipes: what a page is made of */

// Bytes of a page, which is one block of one KV head, for any layer of a model with this head_dim.
// Always a multiple of 16. Known before a model is loaded: a serving engine sizes its cache with
// it.
//
// Errors: BAD_RECIPE, UNSUPPORTED (head_dim).
kakeya_status kakeya_recipe_page_bytes(const char *recipe,
                                       size_t recipe_len,
                                       uint32_t head_dim,
                                       size_t *out_bytes);

// The recipe in full, as JSON: "name", "ratio", "quantizer", "needs_calibration" (true:
// kakeya_codec_new refuses it without an artefact) and every other field that a recipe file may
// set.
//
// Errors: BAD_RECIPE, BUFFER_TOO_SMALL.
kakeya_status kakeya_recipe_describe(const char *recipe,
                                     size_t recipe_len,
                                     char *buf,
                                     size_t cap,
                                     size_t *needed);

// The names of all presets, as a JSON array of strings.
//
// Errors: BUFFER_TOO_SMALL.
kakeya_status kakeya_recipe_list(char *buf, size_t cap, size_t *needed);

/* ---------------------------------------------------------------------------------------------- */
/* 4. Codec: a recipe made ready for a model */

// A recipe made ready for one model: static tables, widths and layouts of all layers.
//
// Threads: immutable once made; any number of threads may use one codec at once, without locks, and
// a thread may release what another made. The one rule: kakeya_codec_free comes after every call
// that uses the codec has returned (as seen by the thread that frees: join it, or hand the codec over).
typedef struct kakeya_codec kakeya_codec;

// Makes a codec.
//
//   recipe       name of a preset, or a recipe as a JSON object
//   model_json   attention shape of the model:
//                {"num_layers":30,"num_kv_heads":3,"num_q_heads":9,"head_dim":64,"max_position":8192,
//                 "rope":{"rotary_dim":64,"interleaved":false,"inv_freq":[rotary_dim/2 numbers]}}
//                num_*_heads count the whole model, not one rank. "rope":null: no rotary embedding.
//                "interleaved":false pairs channels (i, i + rotary_dim/2), true pairs (2i, 2i + 1).
//   calibration  bytes of a calibration artefact, or NULL with calibration_len 0. What is needed of it
//                is copied. A recipe with "needs_calibration" true must have one, any other none.
//   out          takes the new codec; give it to kakeya_codec_free when no call uses it any more.
//
// Errors: BAD_RECIPE, BAD_MODEL, BAD_CALIBRATION, CALIBRATION_REQUIRED, CALIBRATION_MISMATCH,
// WRONG_VERSION (of the artefact), UNSUPPORTED.
kakeya_status kakeya_codec_new(const char *recipe,
                               size_t recipe_len,
                               const char *model_json,
                               size_t model_len,
                               const uint8_t *calibration,
                               size_t calibration_len,
                               kakeya_codec **out);

// Releases a codec, on any thread. NULL is fine. No other call may use the codec during this one or
// after it.
void kakeya_codec_free(kakeya_codec *codec);

// The codec as JSON: "name", "page_bytes", "ratio", "quantizer", "fingerprint" (hex digest of the
// static tables: two codecs with the same fingerprint read each other's pages; keep it with pages
// that you store, and ask kakeya_codec_require_fingerprint before you read them) and per layer its
// slots, code bits and widths.
//
// Errors: BUFFER_TOO_SMALL.
kakeya_status kakeya_codec_describe(const kakeya_codec *codec,
                                    char *buf,
                                    size_t cap,
                                    size_t *needed);

// OK if pages that were written by a codec with this fingerprint mean the same to this one. A page
// does not carry the fingerprint itself: whoever keeps pages beyond the life of a codec, or takes
// them from another process, carries it with them.
//
// Errors: WRONG_RECIPE (another recipe, model or artefact).
kakeya_status kakeya_codec_require_fingerprint(const kakeya_codec *codec,
                                               const char *fingerprint,
                                               size_t fingerprint_len);

// Bytes of a page of a layer. The same number for every layer of this version.
//
// Errors: OUT_OF_RANGE (layer).
kakeya_status kakeya_codec_page_bytes(const kakeya_codec *codec, uint32_t layer, size_t *out);

// Where the parts of a page of one layer lie; offsets and sizes in bytes. What the parts mean is
// in docs/page-format.md.
typedef struct {
  // sizeof(kakeya_page_layout), set by the caller.
  uint32_t struct_size;
  // Tokens of a block: 128.
  uint32_t block_tokens;
  // Channels of a head.
  uint32_t head_dim;
  // The layer that was asked for.
  uint32_t layer;
  // The whole page.
  uint32_t page_bytes;
  // Where the header begins: 0.
  uint32_t header_offset;
  // Bytes of the header.
  uint32_t header_bytes;
  // Where the codes begin: K's, then V's. Where V's begin depends on the head: after the sum of its
  // "k_widths" in kakeya_codec_describe.
  uint32_t k_codes_offset;
  // Bytes of the codes of K and V together.
  uint32_t k_codes_and_v_codes_bytes;
  // Where the side data begin: block statistics of K's channels, then of V's.
  uint32_t side_offset;
  // Bytes of the side data.
  uint32_t side_bytes;
  // Where the exact slots begin: num_slots times slot_bytes.
  uint32_t slots_offset;
  // Bytes of one exact slot.
  uint32_t slot_bytes;
  // Exact slots of a page.
  uint32_t num_slots;
} kakeya_page_layout;

// Fills in the layout of a page of a layer. The caller sets out->struct_size first.
//
// Errors: BAD_STRUCT_SIZE, OUT_OF_RANGE (layer).
kakeya_status kakeya_codec_page_layout(const kakeya_codec *codec,
                                       uint32_t layer,
                                       kakeya_page_layout *out);

/* ---------------------------------------------------------------------------------------------- */
/* 5. Elements of tensors */

// Type of the elements of q, k, v, out and open_blocks.
enum {
  // bfloat16, 2 bytes.
  KAKEYA_DTYPE_BF16 = 0,
  // IEEE half precision, 2 bytes.
  KAKEYA_DTYPE_F16 = 1,
  // IEEE single precision, 4 bytes.
  KAKEYA_DTYPE_F32 = 2,
};
typedef uint32_t kakeya_dtype;

/* ---------------------------------------------------------------------------------------------- */
/* 6. Seal and open: whole blocks */

// Arguments of kakeya_seal.
typedef struct {
  // sizeof(kakeya_seal_args).
  uint32_t struct_size;
  // Layer of the model.
  uint32_t layer;
  // The first KV head of k, v and pages, counted in the whole model: not 0 on later
  // tensor-parallel ranks.
  uint32_t first_head;
  // KV heads of k, v and pages.
  uint32_t num_heads;
  // A kakeya_dtype: type of the elements of k and v.
  uint32_t dtype;
  // Position of the block's first token, divided by 128.
  uint32_t block_index;
  // K after RoPE, [128][num_heads][head_dim].
  const void *k;
  // V, [128][num_heads][head_dim].
  const void *v;
  // Elements from a token of k to the next.
  int64_t k_token_stride;
  // Elements from a head of k to the next.
  int64_t k_head_stride;
  // Elements from a token of v to the next.
  int64_t v_token_stride;
  // Elements from a head of v to the next.
  int64_t v_head_stride;
  // Output: a page for each of num_heads heads.
  uint8_t *pages;
  // Bytes from a head's page to the next; at least the bytes of a page.
  int64_t page_head_stride;
} kakeya_seal_args;

// Seals one whole block. The same values give the same bytes as kakeya_write gives for them, in
// whatever pieces they arrive there.
//
// Errors: BAD_STRUCT_SIZE, BAD_DTYPE, OUT_OF_RANGE (layer, heads, block_index, strides), ALIASED,
// NON_FINITE.
kakeya_status kakeya_seal(const kakeya_codec *codec, const kakeya_seal_args *args);

// Decodes one page into K (after RoPE, as it was sealed) and V.
//
//   layer, head  of the page; head counts the KV heads of the whole model
//   page         page_len bytes, at least kakeya_codec_page_bytes(codec, layer)
//   k, v         float [128][head_dim] each
//   out_len      floats that each of k and v holds, at least 128 * head_dim
//
// The position of the block is in the page. Errors: OUT_OF_RANGE (layer, head), BUFFER_TOO_SMALL
// (page_len, out_len), ALIASED, BAD_PAGE, WRONG_VERSION (of the page).
kakeya_status kakeya_open(const kakeya_codec *codec,
                          uint32_t layer,
                          uint32_t head,
                          const uint8_t *page,
                          size_t page_len,
                          float *k,
                          float *v,
                          size_t out_len);

/* ---------------------------------------------------------------------------------------------- */
/* 7. Write: the tokens of a step */

// Arguments of kakeya_write.
typedef struct {
  // sizeof(kakeya_write_args).
  uint32_t struct_size;
  // Layer of the model.
  uint32_t layer;
  // The first KV head of k, v, pages and open_blocks, counted in the whole model.
  uint32_t first_head;
  // KV heads of k, v, pages and open_blocks.
  uint32_t num_heads;
  // A kakeya_dtype: type of the elements of k, v and open_blocks.
  uint32_t dtype;
  // Tokens of k, v, slot_mapping and positions. 0 is fine: nothing happens.
  uint32_t num_tokens;
  // Blocks of pages and open_slot: block ids are 0..num_blocks-1.
  uint32_t num_blocks;
  // Slots of open_blocks.
  uint32_t num_open;
  // K after RoPE, [num_tokens][num_heads][head_dim].
  const void *k;
  // V, [num_tokens][num_heads][head_dim].
  const void *v;
  // Elements from a token of k to the next.
  int64_t k_token_stride;
  // Elements from a head of k to the next.
  int64_t k_head_stride;
  // Elements from a token of v to the next.
  int64_t v_token_stride;
  // Elements from a head of v to the next.
  int64_t v_head_stride;
  // [num_tokens]: block_id * 128 + offset of each token, or -1 for padding, which is ignored.
  const int64_t *slot_mapping;
  // [num_tokens]: position of each token in its sequence; position % 128 equals slot % 128.
  const int32_t *positions;
  // Output: pages, [num_blocks][num_heads].
  uint8_t *pages;
  // Bytes from a block's pages to the next block's.
  int64_t page_block_stride;
  // Bytes from a head's page to the next head's of the same block.
  int64_t page_head_stride;
  // Output: open blocks, [num_open][2: K, V][num_heads][128][head_dim], contiguous, in dtype.
  // May be NULL if num_open is 0.
  void *open_blocks;
  // [num_blocks]: the slot in open_blocks of each block, or -1. May be NULL if num_open is 0.
  const int32_t *open_slot;
} kakeya_write_args;

// Stores the K and V of a step. Every token goes to the open block of its block; a block whose
// last token (offset 127) is written is sealed into its pages. A token that is written again
// replaces the earlier one, and a block whose last token is written again is sealed again.
//
// A block needs a slot in open_blocks (open_slot[block_id] >= 0, one block a slot) unless this
// call holds all of it: its 128 tokens in ascending order, one after the other. The slot is free
// for another block once its block is sealed, kakeya_attend of that step is done, and none of its
// tokens will be written again.
//
// Errors: BAD_STRUCT_SIZE, BAD_DTYPE, OUT_OF_RANGE (layer, heads, slots, slots named twice,
// positions, strides), NO_OPEN_SLOT, ALIASED, NON_FINITE.
kakeya_status kakeya_write(const kakeya_codec *codec, const kakeya_write_args *args);

/* ---------------------------------------------------------------------------------------------- */
/* 8. Attend: attention of a step */

// Flag of kakeya_attend_args: a query reads pages for every block before its own block, also for
// blocks that were sealed in this step. Results then do not depend on how a prompt was cut into
// steps, or on prefix hits. Without it, a step's own tokens are read raw.
#define KAKEYA_ATTEND_SEALED_PREFILL 1

// Arguments of kakeya_attend.
typedef struct {
  // sizeof(kakeya_attend_args).
  uint32_t struct_size;
  // Layer of the model.
  uint32_t layer;
  // The first KV head of k, v, pages and open_blocks, counted in the whole model.
  uint32_t first_head;
  // KV heads of k, v, pages and open_blocks.
  uint32_t num_kv_heads;
  // Query heads of q, out and lse: as many for each KV head as the model has. Query head i reads
  // KV head i / (num_q_heads / num_kv_heads).
  uint32_t num_q_heads;
  // A kakeya_dtype: type of the elements of q, k, v, out and open_blocks.
  uint32_t dtype;
  // Sequences of query_start, seq_lens and block_table.
  uint32_t num_seqs;
  // Tokens of q, k, v, out and lse.
  uint32_t num_tokens;
  // Blocks of pages and open_slot: block ids are 0..num_blocks-1.
  uint32_t num_blocks;
  // Slots of open_blocks.
  uint32_t num_open;
  // Block ids in a row of block_table.
  uint32_t max_blocks_per_seq;
  // 0 or KAKEYA_ATTEND_SEALED_PREFILL.
  uint32_t flags;
  // Factor on q.k, usually 1/sqrt(head_dim).
  float scale;
  // Queries after RoPE, [num_tokens][num_q_heads][head_dim].
  const void *q;
  // K of the step's tokens after RoPE, [num_tokens][num_kv_heads][head_dim].
  const void *k;
  // V of the step's tokens, [num_tokens][num_kv_heads][head_dim].
  const void *v;
  // Elements from a token of q to the next.
  int64_t q_token_stride;
  // Elements from a head of q to the next.
  int64_t q_head_stride;
  // Elements from a token of k to the next.
  int64_t k_token_stride;
  // Elements from a head of k to the next.
  int64_t k_head_stride;
  // Elements from a token of v to the next.
  int64_t v_token_stride;
  // Elements from a head of v to the next.
  int64_t v_head_stride;
  // Output: attention, [num_tokens][num_q_heads][head_dim]. Rows of no sequence stay untouched.
  void *out;
  // Elements from a token of out to the next.
  int64_t out_token_stride;
  // Elements from a head of out to the next.
  int64_t out_head_stride;
  // [num_seqs + 1], ascending: sequence s has rows query_start[s] .. query_start[s+1]-1 of q, k,
  // v and out. They are the last tokens of the sequence.
  const int32_t *query_start;
  // [num_seqs]: tokens of each sequence, those of this step included.
  const int32_t *seq_lens;
  // [num_seqs][max_blocks_per_seq]: block ids of each sequence; entries past its last block are
  // not read.
  const int32_t *block_table;
  // Entries from a row of block_table to the next; at least max_blocks_per_seq.
  int64_t block_table_stride;
  // Pages, [num_blocks][num_kv_heads].
  const uint8_t *pages;
  // Bytes from a block's pages to the next block's.
  int64_t page_block_stride;
  // Bytes from a head's page to the next head's of the same block.
  int64_t page_head_stride;
  // Open blocks, [num_open][2: K, V][num_kv_heads][128][head_dim], contiguous, in dtype. May be
  // NULL if num_open is 0.
  const void *open_blocks;
  // [num_blocks]: the slot in open_blocks of each block, or -1. May be NULL if num_open is 0.
  const int32_t *open_slot;
  // Output: NULL, or [num_tokens][num_q_heads], contiguous: natural logarithm of the sum of
  // exp(scale * q.k), for combining with attention over other tokens.
  float *lse;
} kakeya_attend_args;

// What some models add to attention, for kakeya_attend_with and kakeya_cuda_attend_with.
typedef struct {
  // sizeof(kakeya_attend_options).
  uint32_t struct_size;
  // Scores s = scale * q.k become soft_cap * tanh(s / soft_cap); 0: they stay.
  float soft_cap;
  // NULL, or [query heads of the call]: the score of a key without a value, for each query head. It
  // takes part in the softmax and adds nothing to the output. Of kakeya_cuda_attend_with on the
  // device.
  const float *sinks;
} kakeya_attend_options;

// Attention of a step's queries, after kakeya_write of the same step. Query token i of a sequence
// sees every token up to itself:
//
//   history      the seq_len - query_len tokens before this step: full blocks from their pages,
//                the rest from the open block
//   this step    raw from k and v (see KAKEYA_ATTEND_SEALED_PREFILL for the other way)
//
// What a sequence computes does not depend on what else is in the step. A sequence without query
// tokens is skipped, whatever its seq_len and blocks are.
//
// Errors: BAD_STRUCT_SIZE, BAD_DTYPE, OUT_OF_RANGE (layer, heads, flags, scale, query_start,
// seq_lens, block_table, strides), NO_OPEN_SLOT, ALIASED, BAD_PAGE (also: a page of another
// position), WRONG_VERSION (of a page).
kakeya_status kakeya_attend(const kakeya_codec *codec, const kakeya_attend_args *args);

// kakeya_attend with a soft cap of scores and attention sinks. lse then counts the sink.
//
// Errors: as kakeya_attend, and OUT_OF_RANGE (soft_cap, sinks that are not finite).
kakeya_status kakeya_attend_with(const kakeya_codec *codec,
                                 const kakeya_attend_args *args,
                                 const kakeya_attend_options *options);

/* ---------------------------------------------------------------------------------------------- */
/* 9. CUDA: a step on a GPU */

// A codec made ready for one CUDA device: kernels loaded, static tables in the device's memory. It
// does not need its codec any more.
//
// Threads: as a codec's. Immutable once made; any number of threads may launch with it at once, each on
// a stream of its own or in turn on one. Launches that may run at the same time need a plan, a
// workspace and counters each.
typedef struct kakeya_cuda kakeya_cuda;

// What steps on the device hold at most; sizes of buffers follow from it (kakeya_cuda_sizes).
typedef struct {
  // sizeof(kakeya_cuda_limits).
  uint32_t struct_size;
  // Ordinal of the device, as CUDA counts the visible ones.
  int32_t device;
  // Sequences of a step.
  uint32_t max_seqs;
  // Tokens of a step.
  uint32_t max_tokens;
  // Tokens of a sequence in a step up to which kakeya_cuda_attend serves it: 1..8. Longer ones are prefill.
  uint32_t max_query;
  // KV heads of this rank.
  uint32_t num_kv_heads;
  // 1: what kakeya_cuda_attend computes for a token depends on no other sequence of the step and not on
  // how many tokens of its own sequence it comes with, bit for bit. No sequence is divided then, so
  // few long ones are slow. 0 otherwise.
  uint32_t batch_invariant;
} kakeya_cuda_limits;

// Buffers in the device's memory that the caller allocates once.
typedef struct {
  // sizeof(kakeya_cuda_buffers), set by the caller.
  uint32_t struct_size;
  // Thread blocks of an attention launch: as many as run at once.
  uint32_t attend_blocks;
  // int32 of a plan.
  uint64_t plan_len;
  // float32 of attention's workspace. Launches on one stream may share it.
  uint64_t workspace_len;
  // int32 of attention's counters: zero before the first launch, and zero again after each.
  uint64_t counters_len;
} kakeya_cuda_buffers;

// Arguments of kakeya_cuda_plan. Pointers but `stream` are to the device's memory.
typedef struct {
  // sizeof(kakeya_cuda_plan_args).
  uint32_t struct_size;
  // Sequences of query_start, seq_lens and block_table, padding included; up to max_seqs.
  uint32_t num_seqs;
  // Block ids in a row of block_table.
  uint32_t max_blocks_per_seq;
  // Blocks of open_slot: block ids are 0..num_blocks-1.
  uint32_t num_blocks;
  // [num_seqs + 1], ascending: rows of each sequence. A sequence without rows is padding.
  const int32_t *query_start;
  // [num_seqs]: tokens of each sequence, those of this step included.
  const int32_t *seq_lens;
  // [num_seqs][max_blocks_per_seq]: block ids of each sequence.
  const int32_t *block_table;
  // Entries from a row of block_table to the next.
  int64_t block_table_stride;
  // [num_blocks]: the slot in open_blocks of each block, or -1.
  const int32_t *open_slot;
  // Output: [plan_len].
  int32_t *plan;
  // A CUstream (cudaStream_t) of the device's primary context.
  void *stream;
} kakeya_cuda_plan_args;

// Arguments of kakeya_cuda_append and kakeya_cuda_seal. Pointers but `stream` are to the device's
// memory.
typedef struct {
  // sizeof(kakeya_cuda_write_args).
  uint32_t struct_size;
  // Layer of the model.
  uint32_t layer;
  // The first KV head of k, v, pages and open_blocks, counted in the whole model.
  uint32_t first_head;
  // KAKEYA_DTYPE_BF16 or KAKEYA_DTYPE_F16: type of the elements of k, v and open_blocks.
  uint32_t dtype;
  // Tokens of k, v and slot_mapping, padding included; up to max_tokens.
  uint32_t num_tokens;
  // Sequences of the plan.
  uint32_t num_seqs;
  // Blocks of pages and open_slot.
  uint32_t num_blocks;
  // Slots of open_blocks.
  uint32_t num_open;
  // K after RoPE, [num_tokens][num_kv_heads][head_dim]. 16-byte aligned, as its strides.
  const void *k;
  // V, likewise.
  const void *v;
  // Elements from a token of k to the next.
  int64_t k_token_stride;
  // Elements from a head of k to the next.
  int64_t k_head_stride;
  // Elements from a token of v to the next.
  int64_t v_token_stride;
  // Elements from a head of v to the next.
  int64_t v_head_stride;
  // [num_tokens]: block_id * 128 + offset of each token, or -1 for padding.
  const int64_t *slot_mapping;
  // [num_blocks]: the slot in open_blocks of each block, or -1.
  const int32_t *open_slot;
  // Output of append: open blocks, [num_open][2: K, V][num_kv_heads][128][head_dim], contiguous.
  void *open_blocks;
  // The plan of this step.
  const int32_t *plan;
  // Output of seal: pages, [num_blocks][num_kv_heads]. 16-byte aligned, as its strides.
  uint8_t *pages;
  // Bytes from a block's pages to the next block's.
  int64_t page_block_stride;
  // Bytes from a head's page to the next head's of the same block.
  int64_t page_head_stride;
  // Output of seal: one uint32 that takes bits where a page could not be written: 1 a value is not
  // finite or above 2^24, 2 a block that began before this step has no slot.
  uint32_t *status;
  // A CUstream of the device's primary context.
  void *stream;
} kakeya_cuda_write_args;

// Arguments of kakeya_cuda_attend. Pointers but `stream` are to the device's memory.
typedef struct {
  // sizeof(kakeya_cuda_attend_args).
  uint32_t struct_size;
  // Layer of the model.
  uint32_t layer;
  // The first KV head of pages and open_blocks, counted in the whole model.
  uint32_t first_head;
  // KAKEYA_DTYPE_BF16 or KAKEYA_DTYPE_F16: type of the elements of q, out and open_blocks.
  uint32_t dtype;
  // Sequences of the plan.
  uint32_t num_seqs;
  // Tokens of q and out, padding included.
  uint32_t num_tokens;
  // Blocks of pages and open_slot.
  uint32_t num_blocks;
  // Slots of open_blocks.
  uint32_t num_open;
  // Block ids in a row of block_table.
  uint32_t max_blocks_per_seq;
  // Factor on q.k, usually 1/sqrt(head_dim).
  float scale;
  // Queries after RoPE, [num_tokens][query heads][head_dim]. 16-byte aligned, as its strides.
  const void *q;
  // Elements from a token of q to the next.
  int64_t q_token_stride;
  // Elements from a head of q to the next.
  int64_t q_head_stride;
  // Output: attention, likewise. Rows of padding and of sequences with more than max_query tokens
  // stay untouched.
  void *out;
  // Elements from a token of out to the next.
  int64_t out_token_stride;
  // Elements from a head of out to the next.
  int64_t out_head_stride;
  // As kakeya_cuda_plan took it.
  const int32_t *query_start;
  // As kakeya_cuda_plan took it.
  const int32_t *seq_lens;
  // As kakeya_cuda_plan took it.
  const int32_t *block_table;
  // Entries from a row of block_table to the next.
  int64_t block_table_stride;
  // Pages, [num_blocks][num_kv_heads]. 16-byte aligned, as its strides.
  const uint8_t *pages;
  // Bytes from a block's pages to the next block's.
  int64_t page_block_stride;
  // Bytes from a head's page to the next head's of the same block.
  int64_t page_head_stride;
  // Open blocks, [num_open][2: K, V][num_kv_heads][128][head_dim], contiguous.
  const void *open_blocks;
  // [num_blocks]: the slot in open_blocks of each block, or -1.
  const int32_t *open_slot;
  // The plan of this step.
  const int32_t *plan;
  // [workspace_len], not read before it is written.
  float *workspace;
  // [counters_len].
  int32_t *counters;
  // A CUstream of the device's primary context.
  void *stream;
} kakeya_cuda_attend_args;

// Arguments of kakeya_cuda_open. Pointers but `stream` are to the device's memory.
typedef struct {
  // sizeof(kakeya_cuda_open_args).
  uint32_t struct_size;
  // Layer of the model.
  uint32_t layer;
  // The first KV head of pages, counted in the whole model.
  uint32_t first_head;
  // KAKEYA_DTYPE_BF16 or KAKEYA_DTYPE_F16: type of the elements of k and v.
  uint32_t dtype;
  // Blocks to open.
  uint32_t count;
  // Blocks of pages.
  uint32_t num_blocks;
  // [count]: ids of the blocks. Block i fills rows 128 i .. 128 i + 127 of k and v.
  const int32_t *blocks;
  // Pages, [num_blocks][num_kv_heads]. 16-byte aligned, as its strides.
  const uint8_t *pages;
  // Bytes from a block's pages to the next block's.
  int64_t page_block_stride;
  // Bytes from a head's page to the next head's of the same block.
  int64_t page_head_stride;
  // Output: K after RoPE, [128 count][num_kv_heads][head_dim]. 16-byte aligned, as its strides.
  void *k;
  // Output: V, likewise.
  void *v;
  // Elements from a token of k to the next.
  int64_t k_token_stride;
  // Elements from a head of k to the next.
  int64_t k_head_stride;
  // Elements from a token of v to the next.
  int64_t v_token_stride;
  // Elements from a head of v to the next.
  int64_t v_head_stride;
  // A CUstream of the device's primary context.
  void *stream;
} kakeya_cuda_open_args;

// What the kernels in this library were compiled for, such as "sm_80 sm_90 compute_80": machine code
// for those GPUs, and code that the driver compiles for newer ones. "" without kernels: then
// kakeya_cuda_new returns NO_KERNELS. Static text.
const char *kakeya_cuda_archs(void);

// Makes a codec ready for a device: loads the kernels and copies the static tables there. The one
// function here that allocates (a few MiB of the device's memory) and waits; give the result to
// kakeya_cuda_free. The codec may be released before.
//
// Errors: BAD_STRUCT_SIZE, OUT_OF_RANGE (limits), NO_KERNELS, NO_CUDA, WRONG_DEVICE (there is none of
// this number), CUDA, UNSUPPORTED (head_dim; too little shared memory).
kakeya_status kakeya_cuda_new(const kakeya_codec *codec,
                              const kakeya_cuda_limits *limits,
                              kakeya_cuda **out);

// Releases a device's codec. NULL is fine. It waits for kernels that run; no other call may use it
// during this one or after it.
void kakeya_cuda_free(kakeya_cuda *cuda);

// Sizes of the buffers that the other functions take. The caller sets out->struct_size first.
//
// Errors: BAD_STRUCT_SIZE.
kakeya_status kakeya_cuda_sizes(const kakeya_cuda *cuda, kakeya_cuda_buffers *out);

// Writes the plan of a step: which blocks it fills, and how attention is divided. Once a step, before
// the other functions; the plan serves all layers. Launches on `stream` and returns at once, as all
// below: nothing is allocated or waited for, so the launch may be captured in a CUDA graph.
//
// What arrays in the device's memory hold is not checked: block ids, slots and lengths must be what
// the comments say. That they begin in memory of the device is (WRONG_DEVICE), here and below.
//
// Errors: BAD_STRUCT_SIZE, OUT_OF_RANGE (num_seqs, strides), ALIASED, WRONG_DEVICE, CUDA.
kakeya_status kakeya_cuda_plan(const kakeya_cuda *cuda,
                               const kakeya_cuda_plan_args *args);

// Copies the K and V of a step into open blocks: every token whose block has a slot.
//
// Errors: BAD_STRUCT_SIZE, BAD_DTYPE, OUT_OF_RANGE (layer, heads, counts, strides), ALIASED,
// WRONG_DEVICE, CUDA.
kakeya_status kakeya_cuda_append(const kakeya_cuda *cuda, const kakeya_cuda_write_args *args);

// Seals the blocks that the step fills, after kakeya_cuda_append of the same step and layer: from k
// and v where the step holds all of a block, else from its open block.
//
// Errors: as kakeya_cuda_append.
kakeya_status kakeya_cuda_seal(const kakeya_cuda *cuda, const kakeya_cuda_write_args *args);

// Attention of the sequences with up to max_query tokens in this step, after kakeya_cuda_seal. A query
// token sees every token of its sequence up to itself: blocks before its own from their pages, also
// those that this step filled, its own block raw.
//
// Errors: BAD_STRUCT_SIZE, BAD_DTYPE, OUT_OF_RANGE (layer, heads, counts, scale, strides), ALIASED,
// WRONG_DEVICE, CUDA.
kakeya_status kakeya_cuda_attend(const kakeya_cuda *cuda,
                                 const kakeya_cuda_attend_args *args);

// kakeya_cuda_attend with a soft cap of scores and attention sinks.
//
// Errors: as kakeya_cuda_attend, and OUT_OF_RANGE (soft_cap), UNSUPPORTED (a soft cap on a GPU with too
// little shared memory for it). Sinks are not looked at: one that is not finite makes its head's output
// so.
kakeya_status kakeya_cuda_attend_with(const kakeya_cuda *cuda,
                                      const kakeya_cuda_attend_args *args,
                                      const kakeya_attend_options *options);

// Whether kakeya_cuda_attend_with would take these options in any step: to be asked before the first one.
//
// Errors: NULL_POINTER, BAD_STRUCT_SIZE, and OUT_OF_RANGE and UNSUPPORTED as kakeya_cuda_attend_with.
kakeya_status kakeya_cuda_require_options(const kakeya_cuda *cuda,
                                          const kakeya_attend_options *options);

// Opens pages into dense rows, for prefill that continues a sequence, and for debugging.
//
// Errors: BAD_STRUCT_SIZE, BAD_DTYPE, OUT_OF_RANGE (layer, heads, count, strides), ALIASED,
// WRONG_DEVICE, CUDA.
kakeya_status kakeya_cuda_open(const kakeya_cuda *cuda, const kakeya_cuda_open_args *args);

#ifdef __cplusplus
} /* extern "C" */
#endif

#endif /* KAKEYA_H */
