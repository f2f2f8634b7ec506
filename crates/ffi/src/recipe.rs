//! Questions about a recipe that need no model: how large its pages are, what it resolves to.

use std::ffi::c_char;

use ::kakeya_codec::Recipe;

use crate::checks::pointer;
use crate::error::Outcome;
use crate::panic::boundary;
use crate::status::kakeya_status;
use crate::text::{text_in, text_out};

/// Bytes of a page, which is one block of one KV head, for any layer of a model with this head_dim.
/// Always a multiple of 16. Known before a model is loaded: a serving engine sizes its cache with
/// it.
///
/// Errors: BAD_RECIPE, UNSUPPORTED (head_dim).
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kakeya_recipe_page_bytes(
    recipe: *const c_char,
    recipe_len: usize,
    head_dim: u32,
    out_bytes: *mut usize,
) -> kakeya_status {
    boundary(|| {
        // SAFETY: the header asks for a text of this length that stays unchanged during the call.
        let recipe = unsafe { parse(recipe, recipe_len) }?;
        pointer("out_bytes", out_bytes)?;
        let bytes = recipe.page_bytes(head_dim as usize)?;
        // SAFETY: not NULL, aligned, and the caller's to write.
        unsafe { out_bytes.write(bytes) };
        Ok(())
    })
}

/// The recipe in full, as JSON: "name", "ratio", "quantizer", "needs_calibration" (true:
/// kakeya_codec_new refuses it without an artefact) and every other field that a recipe file may
/// set.
///
/// Errors: BAD_RECIPE, BUFFER_TOO_SMALL.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kakeya_recipe_describe(
    recipe: *const c_char,
    recipe_len: usize,
    buf: *mut c_char,
    cap: usize,
    needed: *mut usize,
) -> kakeya_status {
    boundary(|| {
        // SAFETY: the header asks for a text of this length that stays unchanged during the call.
        let recipe = unsafe { parse(recipe, recipe_len) }?;
        // SAFETY: the header asks for a buffer of cap bytes and a size that are the caller's to write.
        unsafe { text_out(&recipe.to_json().to_string(), buf, cap, needed) }
    })
}

/// The names of all presets, as a JSON array of strings.
///
/// Errors: BUFFER_TOO_SMALL.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kakeya_recipe_list(
    buf: *mut c_char,
    cap: usize,
    needed: *mut usize,
) -> kakeya_status {
    boundary(|| {
        let names = serde_json::Value::from(Recipe::presets());
        // SAFETY: the header asks for a buffer of cap bytes and a size that are the caller's to write.
        unsafe { text_out(&names.to_string(), buf, cap, needed) }
    })
}

/// Reads a recipe argument.
///
/// # Safety
/// As [`crate::checks::Region::shared`].
pub(crate) unsafe fn parse(recipe: *const c_char, recipe_len: usize) -> Outcome<Recipe> {
    // SAFETY: promised by the caller of this function.
    let text = unsafe { text_in("recipe", recipe, recipe_len) }?;
    Ok(Recipe::parse(text)?)
}
