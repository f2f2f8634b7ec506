/*
 * The ABI as a stranger meets it: versions, frozen numbers (frozen_abi.c has sizes and offsets of structs), texts,
 * recipes, and the making of codecs. Refusals are checked for their code, their text and for outputs that stay as they
 * were.
 */

#include <stddef.h>

#include "check.h"
#include "fixture.h"

#define TEXT(s) (s), strlen(s)

static void test_versions(void) {
  CHECK(kakeya_abi_version() == KAKEYA_ABI_VERSION, "%u", (unsigned)kakeya_abi_version());
  CHECK(KAKEYA_ABI_VERSION == 1, "ABI version changed");
  CHECK(strcmp(kakeya_version(), "0.1.0") == 0, "%s", kakeya_version());
  CHECK_OK(kakeya_require_abi(KAKEYA_ABI_VERSION));
  CHECK_REFUSED(kakeya_require_abi(KAKEYA_ABI_VERSION + 1), KAKEYA_ERR_WRONG_VERSION, "version 2 of the C interface");
  const char *simd = kakeya_simd();
  CHECK(strcmp(simd, "avx512") == 0 || strcmp(simd, "avx2") == 0 || strcmp(simd, "portable") == 0, "%s", simd);
}

static void test_frozen_numbers(void) {
  static const struct {
    int number;
    kakeya_status status;
    const char *name;
  } published[] = {
      {0, KAKEYA_OK, "KAKEYA_OK"},
      {1, KAKEYA_ERR_NULL_POINTER, "KAKEYA_ERR_NULL_POINTER"},
      {2, KAKEYA_ERR_MISALIGNED, "KAKEYA_ERR_MISALIGNED"},
      {3, KAKEYA_ERR_BUFFER_TOO_SMALL, "KAKEYA_ERR_BUFFER_TOO_SMALL"},
      {4, KAKEYA_ERR_OVERFLOW, "KAKEYA_ERR_OVERFLOW"},
      {5, KAKEYA_ERR_OUT_OF_RANGE, "KAKEYA_ERR_OUT_OF_RANGE"},
      {6, KAKEYA_ERR_BAD_STRUCT_SIZE, "KAKEYA_ERR_BAD_STRUCT_SIZE"},
      {7, KAKEYA_ERR_BAD_UTF8, "KAKEYA_ERR_BAD_UTF8"},
      {8, KAKEYA_ERR_BAD_RECIPE, "KAKEYA_ERR_BAD_RECIPE"},
      {9, KAKEYA_ERR_BAD_MODEL, "KAKEYA_ERR_BAD_MODEL"},
      {10, KAKEYA_ERR_BAD_CALIBRATION, "KAKEYA_ERR_BAD_CALIBRATION"},
      {11, KAKEYA_ERR_CALIBRATION_REQUIRED, "KAKEYA_ERR_CALIBRATION_REQUIRED"},
      {12, KAKEYA_ERR_CALIBRATION_MISMATCH, "KAKEYA_ERR_CALIBRATION_MISMATCH"},
      {13, KAKEYA_ERR_UNSUPPORTED, "KAKEYA_ERR_UNSUPPORTED"},
      {14, KAKEYA_ERR_NON_FINITE, "KAKEYA_ERR_NON_FINITE"},
      {15, KAKEYA_ERR_BAD_PAGE, "KAKEYA_ERR_BAD_PAGE"},
      {16, KAKEYA_ERR_NO_OPEN_SLOT, "KAKEYA_ERR_NO_OPEN_SLOT"},
      {17, KAKEYA_ERR_ALIASED, "KAKEYA_ERR_ALIASED"},
      {18, KAKEYA_ERR_BAD_DTYPE, "KAKEYA_ERR_BAD_DTYPE"},
      {19, KAKEYA_ERR_NO_KERNELS, "KAKEYA_ERR_NO_KERNELS"},
      {20, KAKEYA_ERR_NO_CUDA, "KAKEYA_ERR_NO_CUDA"},
      {21, KAKEYA_ERR_CUDA, "KAKEYA_ERR_CUDA"},
      {22, KAKEYA_ERR_WRONG_VERSION, "KAKEYA_ERR_WRONG_VERSION"},
      {23, KAKEYA_ERR_WRONG_DEVICE, "KAKEYA_ERR_WRONG_DEVICE"},
      {24, KAKEYA_ERR_WRONG_RECIPE, "KAKEYA_ERR_WRONG_RECIPE"},
      {99, KAKEYA_ERR_PANIC, "KAKEYA_ERR_PANIC"},
  };
  for (size_t i = 0; i < sizeof published / sizeof published[0]; ++i) {
    CHECK(published[i].status == published[i].number, "%s", published[i].name);
    CHECK(strcmp(kakeya_status_name(published[i].number), published[i].name) == 0, "%s",
          kakeya_status_name(published[i].number));
  }
  CHECK(strcmp(kakeya_status_name(25), "KAKEYA_ERR_UNKNOWN") == 0, "%s", kakeya_status_name(25));
  CHECK(strcmp(kakeya_status_name(-1), "KAKEYA_ERR_UNKNOWN") == 0, "%s", kakeya_status_name(-1));
  CHECK(KAKEYA_DTYPE_BF16 == 0 && KAKEYA_DTYPE_F16 == 1 && KAKEYA_DTYPE_F32 == 2, "dtypes changed");
  CHECK(KAKEYA_ATTEND_SEALED_PREFILL == 1, "flags changed");
  CHECK(KAKEYA_BLOCK_TOKENS == 128, "block size changed");
}

static void test_texts(void) {
  char buf[8192];
  size_t needed = 0;
  CHECK_OK(kakeya_recipe_list(NULL, 0, &needed));
  CHECK(needed > 2 && needed < sizeof buf, "%zu", needed);
  const size_t size = needed;

  memset(buf, 0x5a, sizeof buf);
  CHECK_REFUSED(kakeya_recipe_list(buf, size - 1, &needed), KAKEYA_ERR_BUFFER_TOO_SMALL, "buf holds");
  CHECK(needed == size, "%zu", needed);
  CHECK(buf[0] == 0x5a && memcmp(buf, buf + 1, sizeof buf - 1) == 0, "buf was touched");
  CHECK_REFUSED(kakeya_recipe_list(buf, 0, &needed), KAKEYA_ERR_BUFFER_TOO_SMALL, "buf holds 0");
  CHECK_REFUSED(kakeya_recipe_list(NULL, 7, &needed), KAKEYA_ERR_NULL_POINTER, "buf is NULL");
  CHECK_REFUSED(kakeya_recipe_list(buf, sizeof buf, NULL), KAKEYA_ERR_NULL_POINTER, "needed is NULL");
  CHECK_REFUSED(kakeya_recipe_list(buf, sizeof buf, (size_t *)(void *)(buf + 1)), KAKEYA_ERR_MISALIGNED,
                "needed is at");
  CHECK(buf[0] == 0x5a && memcmp(buf, buf + 1, sizeof buf - 1) == 0, "buf was touched");

  needed = 0;
  CHECK_OK(kakeya_recipe_list(buf, size, &needed));
  CHECK(needed == size && strlen(buf) + 1 == size, "%zu", needed);
  CHECK(buf[size] == 0x5a, "wrote past the end");
  CHECK(buf[0] == '[' && strstr(buf, "\"kakeya-4.6x\"") && strstr(buf, "\"kakeya-free-4.6x\""), "%s", buf);

  CHECK_OK(kakeya_recipe_describe(TEXT("kakeya-4.6x"), buf, sizeof buf, &needed));
  CHECK(strstr(buf, "\"needs_calibration\":true") && strstr(buf, "\"ratio\":4.6"), "%s", buf);
  CHECK_OK(kakeya_recipe_describe(TEXT("kakeya-free-4.0x"), buf, sizeof buf, &needed));
  CHECK(strstr(buf, "\"needs_calibration\":false") && strstr(buf, "\"quantizer\":\"uniform\""), "%s", buf);
}

static void test_recipes(void) {
  size_t bytes = 7;
  CHECK_OK(kakeya_recipe_page_bytes(TEXT("kakeya-4.6x"), HEAD_DIM, &bytes));
  CHECK(bytes == 512 * HEAD_DIM * 10 / 46 / 16 * 16, "%zu", bytes);
  /* Only recipe_len bytes count. */
  bytes = 7;
  CHECK_OK(kakeya_recipe_page_bytes("kakeya-4.6x and more", 11, HEAD_DIM, &bytes));
  CHECK(bytes != 7, "not set");

  bytes = 7;
  CHECK_REFUSED(kakeya_recipe_page_bytes(NULL, 3, HEAD_DIM, &bytes), KAKEYA_ERR_NULL_POINTER, "recipe is NULL");
  CHECK_REFUSED(kakeya_recipe_page_bytes(TEXT("kakeya-4.6x"), HEAD_DIM, NULL), KAKEYA_ERR_NULL_POINTER,
                "out_bytes is NULL");
  CHECK_REFUSED(kakeya_recipe_page_bytes(TEXT("kak\xff"), HEAD_DIM, &bytes), KAKEYA_ERR_BAD_UTF8, "byte 3 of 4");
  CHECK_REFUSED(kakeya_recipe_page_bytes("k", (size_t)-1, HEAD_DIM, &bytes), KAKEYA_ERR_OVERFLOW, "recipe spans");
  CHECK_REFUSED(kakeya_recipe_page_bytes(TEXT("kakeya-9.9x"), HEAD_DIM, &bytes), KAKEYA_ERR_BAD_RECIPE, "kakeya-9.9x");
  CHECK_REFUSED(kakeya_recipe_page_bytes("", 0, HEAD_DIM, &bytes), KAKEYA_ERR_BAD_RECIPE, "recipe");
  CHECK_REFUSED(kakeya_recipe_page_bytes(TEXT("{\"bits\":3}"), HEAD_DIM, &bytes), KAKEYA_ERR_BAD_RECIPE, "bits");
  CHECK_REFUSED(kakeya_recipe_page_bytes(TEXT("kakeya-4.6x"), 80, &bytes), KAKEYA_ERR_UNSUPPORTED, "head_dim 80");
  CHECK(bytes == 7, "an output was touched");
}

static void test_codec_refusals(void) {
  kakeya_codec *const canary = (kakeya_codec *)(void *)&check_failures;
  kakeya_codec *codec = canary;
  const char *model = model_json();
  uint8_t junk[16] = {0};
  size_t len = 0;

  CHECK_REFUSED(kakeya_codec_new(TEXT("kakeya-free-4.6x"), TEXT(model), NULL, 0, NULL), KAKEYA_ERR_NULL_POINTER,
                "out is NULL");
  CHECK_REFUSED(kakeya_codec_new(TEXT("kakeya-free-4.6x"), NULL, 5, NULL, 0, &codec), KAKEYA_ERR_NULL_POINTER,
                "model_json");
  CHECK_REFUSED(kakeya_codec_new(TEXT("kakeya-free-4.6x"), TEXT(model), NULL, 9, &codec), KAKEYA_ERR_NULL_POINTER,
                "calibration is NULL");
  CHECK_REFUSED(kakeya_codec_new(TEXT("nonsense"), TEXT(model), NULL, 0, &codec), KAKEYA_ERR_BAD_RECIPE, "nonsense");
  CHECK_REFUSED(kakeya_codec_new(TEXT("kakeya-free-4.6x"), TEXT("{}"), NULL, 0, &codec), KAKEYA_ERR_BAD_MODEL,
                "num_layers");
  CHECK_REFUSED(kakeya_codec_new(TEXT("kakeya-free-4.6x"), TEXT("\xff"), NULL, 0, &codec), KAKEYA_ERR_BAD_UTF8,
                "model_json");
  CHECK_REFUSED(kakeya_codec_new(TEXT("kakeya-free-4.6x"),
                                 TEXT("{\"num_layers\":1,\"num_kv_heads\":1,\"num_q_heads\":1,\"head_dim\":80,"
                                      "\"max_position\":64,\"rope\":null}"),
                                 NULL, 0, &codec),
                KAKEYA_ERR_UNSUPPORTED, "80");
  CHECK_REFUSED(kakeya_codec_new(TEXT("kakeya-4.6x"), TEXT(model), NULL, 0, &codec), KAKEYA_ERR_CALIBRATION_REQUIRED,
                "kakeya calibrate");
  CHECK_REFUSED(kakeya_codec_new(TEXT("kakeya-4.6x"), TEXT(model), junk, sizeof junk, &codec),
                KAKEYA_ERR_BAD_CALIBRATION, "calibration");
  CHECK_REFUSED(kakeya_codec_new(TEXT("kakeya-4.6x"), TEXT(model), junk, 0, &codec), KAKEYA_ERR_BAD_CALIBRATION,
                "0 bytes");
  uint8_t *other = calibration(KV_HEADS + 1, &len);
  CHECK_REFUSED(kakeya_codec_new(TEXT("kakeya-4.6x"), TEXT(model), other, len, &codec), KAKEYA_ERR_CALIBRATION_MISMATCH,
                "[2, 3, 64]");
  release(other);
  uint8_t *unwanted = calibration(KV_HEADS, &len);
  CHECK_REFUSED(kakeya_codec_new(TEXT("kakeya-free-4.6x"), TEXT(model), unwanted, len, &codec),
                KAKEYA_ERR_BAD_CALIBRATION, "takes no calibration");
  release(unwanted);
  CHECK(codec == canary, "an output was touched");
}

static void test_codec_questions(void) {
  kakeya_codec *codec = codec_of("kakeya-free-4.6x");
  char buf[8192];
  size_t needed = 0, bytes = 7;
  CHECK_OK(kakeya_codec_describe(codec, buf, sizeof buf, &needed));
  CHECK(strstr(buf, "\"fingerprint\":\"") && strstr(buf, "\"layers\":[") && strstr(buf, "\"page_bytes\":7120"), "%s",
        buf);

  /* Pages of another recipe with pages of the same size are told by their fingerprint. */
  kakeya_codec *other = codec_of("kakeya-free-4.6x-trellis");
  char theirs[8192];
  CHECK_OK(kakeya_codec_describe(other, theirs, sizeof theirs, &needed));
  const char *mine = strstr(buf, "\"fingerprint\":\"") + 15;
  const char *foreign = strstr(theirs, "\"fingerprint\":\"") + 15;
  CHECK_OK(kakeya_codec_require_fingerprint(codec, mine, 64));
  CHECK_REFUSED(kakeya_codec_require_fingerprint(codec, foreign, 64), KAKEYA_ERR_WRONG_RECIPE, "fingerprint");
  CHECK_REFUSED(kakeya_codec_require_fingerprint(codec, mine, 63), KAKEYA_ERR_WRONG_RECIPE, "fingerprint");
  CHECK_REFUSED(kakeya_codec_require_fingerprint(codec, NULL, 64), KAKEYA_ERR_NULL_POINTER, "fingerprint is NULL");
  CHECK_REFUSED(kakeya_codec_require_fingerprint(NULL, mine, 64), KAKEYA_ERR_NULL_POINTER, "codec is NULL");
  kakeya_codec_free(other);

  CHECK_REFUSED(kakeya_codec_page_bytes(codec, LAYERS, &bytes), KAKEYA_ERR_OUT_OF_RANGE, "layer is 2; valid: 0..=1");
  CHECK_REFUSED(kakeya_codec_page_bytes(codec, 0, NULL), KAKEYA_ERR_NULL_POINTER, "out is NULL");
  CHECK_REFUSED(kakeya_codec_page_bytes(NULL, 0, &bytes), KAKEYA_ERR_NULL_POINTER, "codec is NULL");
  CHECK_REFUSED(kakeya_codec_page_bytes((const kakeya_codec *)(const void *)((const char *)codec + 1), 0, &bytes),
                KAKEYA_ERR_MISALIGNED, "codec is at");
  CHECK(bytes == 7, "an output was touched");
  CHECK_OK(kakeya_codec_page_bytes(codec, LAYERS - 1, &bytes));

  kakeya_page_layout layout, before;
  memset(&layout, 0x5a, sizeof layout);
  before = layout;
  CHECK_REFUSED(kakeya_codec_page_layout(codec, 0, &layout), KAKEYA_ERR_BAD_STRUCT_SIZE,
                "sizeof(kakeya_page_layout) = 56");
  layout.struct_size = before.struct_size = sizeof layout;
  CHECK_REFUSED(kakeya_codec_page_layout(codec, LAYERS, &layout), KAKEYA_ERR_OUT_OF_RANGE, "layer");
  CHECK_REFUSED(kakeya_codec_page_layout(codec, 0, NULL), KAKEYA_ERR_NULL_POINTER, "out is NULL");
  CHECK(memcmp(&layout, &before, sizeof layout) == 0, "an output was touched");
  CHECK_OK(kakeya_codec_page_layout(codec, 1, &layout));
  CHECK(layout.struct_size == sizeof layout && layout.block_tokens == BLOCK && layout.head_dim == HEAD_DIM &&
            layout.layer == 1 && layout.page_bytes == bytes,
        "layout");
  /* Header, codes, side data, slots: in this order, without overlap, inside the page. */
  CHECK(layout.header_offset + layout.header_bytes <= layout.k_codes_offset, "header");
  CHECK(layout.k_codes_offset + layout.k_codes_and_v_codes_bytes <= layout.side_offset, "codes");
  CHECK(layout.side_offset + layout.side_bytes <= layout.slots_offset, "side data");
  CHECK(layout.num_slots > 0 && layout.slots_offset + layout.num_slots * layout.slot_bytes <= layout.page_bytes,
        "slots");
  kakeya_codec_free(codec);
  kakeya_codec_free(NULL);
}

static void test_calibrated_codec(void) {
  size_t len = 0;
  uint8_t *file = calibration(KV_HEADS, &len);
  kakeya_codec *codec = NULL;
  CHECK_OK(kakeya_codec_new(TEXT("kakeya-4.6x"), TEXT(model_json()), file, len, &codec));
  memset(file, 0, len); /* copied: the artefact may go */
  release(file);
  char buf[8192];
  size_t needed = 0;
  CHECK_OK(kakeya_codec_describe(codec, buf, sizeof buf, &needed));
  CHECK(strstr(buf, "\"name\":\"kakeya-4.6x\""), "%s", buf);
  kakeya_codec_free(codec);
}

/* What can be refused without a GPU; tests/vllm and tests/gpu have the rest. */
static void test_cuda_refusals(void) {
  kakeya_codec *codec = codec_of("kakeya-free-4.6x");
  kakeya_cuda *const canary = (kakeya_cuda *)(void *)&check_failures;
  kakeya_cuda *cuda = canary;
  const kakeya_cuda_limits good = {.struct_size = sizeof good,
                                   .device = 0,
                                   .max_seqs = 4,
                                   .max_tokens = 512,
                                   .max_query = 8,
                                   .num_kv_heads = KV_HEADS};
  kakeya_cuda_limits bad = good;
  CHECK_REFUSED(kakeya_cuda_new(codec, &good, NULL), KAKEYA_ERR_NULL_POINTER, "out is NULL");
  CHECK_REFUSED(kakeya_cuda_new(codec, NULL, &cuda), KAKEYA_ERR_NULL_POINTER, "limits is NULL");
  CHECK_REFUSED(kakeya_cuda_new(NULL, &good, &cuda), KAKEYA_ERR_NULL_POINTER, "codec is NULL");
  bad.struct_size = 8;
  CHECK_REFUSED(kakeya_cuda_new(codec, &bad, &cuda), KAKEYA_ERR_BAD_STRUCT_SIZE, "limits->struct_size is 8");
  bad = good, bad.max_seqs = 0;
  CHECK_REFUSED(kakeya_cuda_new(codec, &bad, &cuda), KAKEYA_ERR_OUT_OF_RANGE, "max_seqs is 0");
  bad = good, bad.max_tokens = 3;
  CHECK_REFUSED(kakeya_cuda_new(codec, &bad, &cuda), KAKEYA_ERR_OUT_OF_RANGE, "max_tokens is 3; valid: 4..=");
  bad = good, bad.max_query = 9;
  CHECK_REFUSED(kakeya_cuda_new(codec, &bad, &cuda), KAKEYA_ERR_OUT_OF_RANGE, "max_query is 9; valid: 1..=8");
  bad = good, bad.batch_invariant = 2;
  CHECK_REFUSED(kakeya_cuda_new(codec, &bad, &cuda), KAKEYA_ERR_OUT_OF_RANGE, "batch_invariant is 2; valid: 0..=1");
  bad = good, bad.num_kv_heads = KV_HEADS + 1;
  CHECK_REFUSED(kakeya_cuda_new(codec, &bad, &cuda), KAKEYA_ERR_OUT_OF_RANGE, "num_kv_heads is 3");
  bad = good, bad.device = 1000;
  if (*kakeya_cuda_archs() == 0)
    CHECK_REFUSED(kakeya_cuda_new(codec, &bad, &cuda), KAKEYA_ERR_NO_KERNELS, "built without kernels");
  else {
    /* With a driver the device is looked for, and is not there. */
    const kakeya_status status = kakeya_cuda_new(codec, &bad, &cuda);
    CHECK(status == KAKEYA_ERR_NO_CUDA ||
              (status == KAKEYA_ERR_WRONG_DEVICE && strstr(kakeya_last_error(), "device is 1000")),
          "%s: %s", kakeya_status_name(status), kakeya_last_error());
  }
  CHECK(cuda == canary, "an output was touched");
  kakeya_codec_free(codec);
  kakeya_cuda_free(NULL);

  kakeya_cuda_buffers buffers = {.struct_size = sizeof buffers};
  CHECK_REFUSED(kakeya_cuda_sizes(NULL, &buffers), KAKEYA_ERR_NULL_POINTER, "cuda is NULL");
  CHECK_REFUSED(kakeya_cuda_sizes(NULL, NULL), KAKEYA_ERR_NULL_POINTER, "out is NULL");
#define WITHOUT_HANDLE(function, type)                                                     \
  do {                                                                                     \
    type args = {.struct_size = sizeof args};                                              \
    CHECK_REFUSED(function(NULL, NULL), KAKEYA_ERR_NULL_POINTER, "args is NULL");          \
    CHECK_REFUSED(function(NULL, &args), KAKEYA_ERR_NULL_POINTER, "cuda is NULL");         \
    args.struct_size -= 8;                                                                 \
    CHECK_REFUSED(function(NULL, &args), KAKEYA_ERR_BAD_STRUCT_SIZE, "sizeof(" #type ")"); \
  } while (0)
  WITHOUT_HANDLE(kakeya_cuda_plan, kakeya_cuda_plan_args);
  WITHOUT_HANDLE(kakeya_cuda_append, kakeya_cuda_write_args);
  WITHOUT_HANDLE(kakeya_cuda_seal, kakeya_cuda_write_args);
  WITHOUT_HANDLE(kakeya_cuda_attend, kakeya_cuda_attend_args);
  WITHOUT_HANDLE(kakeya_cuda_open, kakeya_cuda_open_args);

  kakeya_attend_options options = {.struct_size = sizeof options};
  CHECK_REFUSED(kakeya_cuda_require_options(NULL, NULL), KAKEYA_ERR_NULL_POINTER, "options is NULL");
  CHECK_REFUSED(kakeya_cuda_require_options(NULL, &options), KAKEYA_ERR_NULL_POINTER, "cuda is NULL");
  options.struct_size -= 8;
  CHECK_REFUSED(kakeya_cuda_require_options(NULL, &options), KAKEYA_ERR_BAD_STRUCT_SIZE,
                "sizeof(kakeya_attend_options)");
}

int main(void) {
  CHECK(strcmp(kakeya_last_error(), "") == 0, "no call has failed yet: %s", kakeya_last_error());
  test_versions();
  test_frozen_numbers();
  test_texts();
  test_recipes();
  test_codec_refusals();
  test_codec_questions();
  test_calibrated_codec();
  test_cuda_refusals();
  return failures("test_abi");
}
