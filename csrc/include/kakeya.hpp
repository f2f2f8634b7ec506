// kakeya.hpp - C++17 over kakeya.h: a codec that releases itself, exceptions instead of statuses,
// std::string instead of buffers. Header-only; everything is inline and adds no state of its own.
//
//   kakeya::Codec codec("kakeya-free-4.6x", model_json);
//   auto args = kakeya::make<kakeya_seal_args>();   // zeroed, struct_size set
//   args.num_heads = 3; ...
//   codec.seal(args);                                // throws kakeya::Error
//
// Rules of ownership, memory and threads are those of kakeya.h. Every function that can fail throws
// kakeya::Error; outputs are then untouched. Nothing here throws anything else but std::bad_alloc.
//
// Copyright the KAKEYA authors. Licence: Apache-2.0.

#ifndef KAKEYA_HPP
#define KAKEYA_HPP

#include <cstddef>
#include <cstdint>
#include <memory>
#include <stdexcept>
#include <string>
#include <string_view>
#include <type_traits>
#include <vector>

#include "kakeya.h"

namespace kakeya {

// A status other than KAKEYA_OK. what() is "KAKEYA_ERR_...: reason".
class Error : public std::runtime_error {
 public:
  Error(kakeya_status status, const std::string &reason)
      : std::runtime_error(std::string(kakeya_status_name(status)) + ": " + reason), status_(status) {}

  // The status, for programs that act on it.
  kakeya_status status() const noexcept { return status_; }

 private:
  kakeya_status status_;
};

// Throws the last error of this thread if status is not KAKEYA_OK.
inline void check(kakeya_status status) {
  if (status != KAKEYA_OK) throw Error(status, kakeya_last_error());
}

// A zeroed argument struct with struct_size set.
template <typename Args>
Args make() noexcept {
  static_assert(std::is_trivial<Args>::value, "for the structs of kakeya.h");
  Args args{};
  args.struct_size = static_cast<std::uint32_t>(sizeof(Args));
  return args;
}

namespace detail {

// Asks a text function for its size, then for its text.
template <typename Call>
std::string text(Call call) {
  std::size_t needed = 0;
  check(call(nullptr, std::size_t{0}, &needed));
  std::string out(needed, '\0');
  check(call(&out[0], out.size(), &needed));
  out.resize(needed - 1);  // without the terminating NUL
  return out;
}

}  // namespace detail

// Version of the library, such as "0.1.0".
inline std::string_view version() noexcept {
  return kakeya_version();
}

// What run-time dispatch chose: "avx512", "avx2" or "portable".
inline std::string_view simd() noexcept {
  return kakeya_simd();
}

// Refuses a library whose ABI is not the one of the header that this was compiled against.
inline void require_abi() {
  const std::uint32_t found = kakeya_abi_version();
  if (found != KAKEYA_ABI_VERSION) {
    throw Error(KAKEYA_ERR_WRONG_VERSION, "libkakeya has ABI " + std::to_string(found) +
                                              ", this program was compiled for ABI " +
                                              std::to_string(KAKEYA_ABI_VERSION));
  }
}

// Names of all presets, a JSON array.
inline std::string recipe_list() {
  return detail::text(
      [](char *buf, std::size_t cap, std::size_t *needed) { return kakeya_recipe_list(buf, cap, needed); });
}

// A recipe in full, a JSON object.
inline std::string recipe_describe(std::string_view recipe) {
  return detail::text([recipe](char *buf, std::size_t cap, std::size_t *needed) {
    return kakeya_recipe_describe(recipe.data(), recipe.size(), buf, cap, needed);
  });
}

// Bytes of a page for a model with this head_dim.
inline std::size_t recipe_page_bytes(std::string_view recipe, std::uint32_t head_dim) {
  std::size_t bytes = 0;
  check(kakeya_recipe_page_bytes(recipe.data(), recipe.size(), head_dim, &bytes));
  return bytes;
}

// K and V of one opened page, [128][head_dim] each.
struct Block {
  std::vector<float> k;
  std::vector<float> v;
};

// A recipe made ready for one model. Move-only. A const Codec may be used by many threads at once;
// moving and destroying it may not overlap with any use.
class Codec {
 public:
  // calibration: bytes of an artefact, or nullptr and 0 for none; copied.
  Codec(std::string_view recipe, std::string_view model_json, const std::uint8_t *calibration = nullptr,
        std::size_t calibration_len = 0) {
    kakeya_codec *made = nullptr;
    check(kakeya_codec_new(recipe.data(), recipe.size(), model_json.data(), model_json.size(), calibration,
                           calibration_len, &made));
    handle_.reset(made);
  }

  // The same from a vector; an empty one is none.
  Codec(std::string_view recipe, std::string_view model_json, const std::vector<std::uint8_t> &calibration)
      : Codec(recipe, model_json, calibration.empty() ? nullptr : calibration.data(), calibration.size()) {}

  Codec(Codec &&) noexcept = default;
  Codec &operator=(Codec &&) noexcept = default;
  Codec(const Codec &) = delete;
  Codec &operator=(const Codec &) = delete;

  // The handle, for calls of kakeya.h; still owned by this object. nullptr after a move.
  const kakeya_codec *get() const noexcept { return handle_.get(); }

  // The codec in full, a JSON object.
  std::string describe() const {
    return detail::text([this](char *buf, std::size_t cap, std::size_t *needed) {
      return kakeya_codec_describe(get(), buf, cap, needed);
    });
  }

  std::size_t page_bytes(std::uint32_t layer = 0) const {
    std::size_t bytes = 0;
    check(kakeya_codec_page_bytes(get(), layer, &bytes));
    return bytes;
  }

  kakeya_page_layout page_layout(std::uint32_t layer) const {
    auto layout = make<kakeya_page_layout>();
    check(kakeya_codec_page_layout(get(), layer, &layout));
    return layout;
  }

  void seal(const kakeya_seal_args &args) const { check(kakeya_seal(get(), &args)); }

  // Opens a page into the caller's memory: k and v take floats each, at least 128 * head_dim.
  void open(std::uint32_t layer, std::uint32_t head, const std::uint8_t *page, std::size_t page_len, float *k, float *v,
            std::size_t floats) const {
    check(kakeya_open(get(), layer, head, page, page_len, k, v, floats));
  }

  // Opens a page into vectors.
  Block open(std::uint32_t layer, std::uint32_t head, const std::uint8_t *page, std::size_t page_len) const {
    const std::size_t floats = std::size_t{KAKEYA_BLOCK_TOKENS} * page_layout(layer).head_dim;
    Block block{std::vector<float>(floats), std::vector<float>(floats)};
    open(layer, head, page, page_len, block.k.data(), block.v.data(), floats);
    return block;
  }

  void write(const kakeya_write_args &args) const { check(kakeya_write(get(), &args)); }

  void attend(const kakeya_attend_args &args) const { check(kakeya_attend(get(), &args)); }

 private:
  struct Free {
    void operator()(kakeya_codec *codec) const noexcept { kakeya_codec_free(codec); }
  };
  std::unique_ptr<kakeya_codec, Free> handle_;
};

}  // namespace kakeya

#endif  // KAKEYA_HPP
