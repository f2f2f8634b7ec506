// kakeya.hpp: ownership, exceptions, and the same results as the C functions.

#include <cmath>
#include <cstring>
#include <utility>

#include "check.h"
#include "kakeya.hpp"

extern "C" {
#include "world.h"
}

namespace {

template <typename Call>
void refused(Call call, kakeya_status status, const char *part) {
  try {
    call();
    CHECK(false, "nothing was thrown, %s was expected", kakeya_status_name(status));
  } catch (const kakeya::Error &error) {
    CHECK(error.status() == status, "%s", error.what());
    CHECK(std::strstr(error.what(), part) != nullptr, "%s", error.what());
    CHECK(std::string(error.what()).find(kakeya_status_name(status)) == 0, "%s", error.what());
  }
}

void test_questions() {
  kakeya::require_abi();
  CHECK(kakeya::version() == "0.1.0", "%s", kakeya_version());
  CHECK(!kakeya::simd().empty(), "simd");
  CHECK(kakeya::recipe_list().find("\"kakeya-4.6x\"") != std::string::npos, "recipes");
  CHECK(kakeya::recipe_describe("kakeya-4.6x").back() == '}', "%s", kakeya::recipe_describe("kakeya-4.6x").c_str());
  CHECK(kakeya::recipe_page_bytes("kakeya-4.6x", 128) == 14240, "%zu", kakeya::recipe_page_bytes("kakeya-4.6x", 128));
  refused([] { kakeya::recipe_describe("nonsense"); }, KAKEYA_ERR_BAD_RECIPE, "nonsense");
}

void test_ownership() {
  static_assert(!std::is_copy_constructible<kakeya::Codec>::value, "a codec is not copied");
  static_assert(!std::is_copy_assignable<kakeya::Codec>::value, "a codec is not copied");
  static_assert(std::is_nothrow_move_constructible<kakeya::Codec>::value, "a codec is moved");

  kakeya::Codec codec("kakeya-free-4.6x", model_json());
  const kakeya_codec *const handle = codec.get();
  kakeya::Codec moved(std::move(codec));
  CHECK(moved.get() == handle, "moving keeps the handle");
  refused([&] { codec.page_bytes(); }, KAKEYA_ERR_NULL_POINTER, "codec is NULL");
  codec = std::move(moved);
  CHECK(codec.get() == handle && codec.describe().find("\"fingerprint\"") != std::string::npos, "moved back");

  refused([] { kakeya::Codec("kakeya-4.6x", model_json()); }, KAKEYA_ERR_CALIBRATION_REQUIRED, "calibrat");
  std::size_t len = 0;
  std::uint8_t *file = calibration(KV_HEADS, &len);
  const std::vector<std::uint8_t> artefact(file, file + len);
  release(file);
  const kakeya::Codec calibrated("kakeya-4.6x", model_json(), artefact);
  CHECK(calibrated.page_bytes() == codec.page_bytes(), "same ratio, same page");
  refused([] { kakeya::Codec("kakeya-4.6x", "{}", std::vector<std::uint8_t>{}); }, KAKEYA_ERR_BAD_MODEL, "num_layers");
}

void test_step() {
  const kakeya::Codec codec("kakeya-free-4.6x", model_json());
  world *w = world_new(codec.get(), KAKEYA_DTYPE_F32, BLOCK, 0, 1, 1);
  codec.write(w->write);
  const std::vector<std::uint8_t> written(w->pages, w->pages + KV_HEADS * w->page_bytes);
  world_mark(w);
  codec.seal(w->seal);
  CHECK(std::memcmp(written.data(), w->pages, written.size()) == 0, "write and seal differ");

  const kakeya::Block block = codec.open(1, 1, w->pages + w->page_bytes, w->page_bytes);
  CHECK(block.k.size() == BLOCK * HEAD_DIM && block.v.size() == block.k.size(), "%zu", block.k.size());
  double error = 0.0;
  double energy = 0.0;
  for (std::size_t i = 0; i < block.k.size(); ++i) {
    const std::size_t at = (i / HEAD_DIM * KV_HEADS + 1) * HEAD_DIM + i % HEAD_DIM;
    const double want = load(w->dtype, w->k, at);
    error += (block.k[i] - want) * (block.k[i] - want);
    energy += want * want;
  }
  CHECK(std::sqrt(error / energy) < 0.3, "%f", std::sqrt(error / energy));
  CHECK(codec.page_layout(1).page_bytes == w->page_bytes, "layout");

  codec.attend(w->attend);
  auto args = kakeya::make<kakeya_attend_args>();
  CHECK(args.struct_size == sizeof args && args.q == nullptr && args.num_seqs == 0, "make");
  refused([&] { codec.attend(args); }, KAKEYA_ERR_OUT_OF_RANGE, "num_kv_heads");
  refused([&] { codec.open(1, 0, written.data(), 5); }, KAKEYA_ERR_BUFFER_TOO_SMALL, "page_len is 5");
  world_free(w);
}

}  // namespace

int main() {
  try {
    test_questions();
    test_ownership();
    test_step();
  } catch (const std::exception &error) {
    CHECK(false, "%s", error.what());
  }
  return failures("test_raii");
}
