//! Target `recipe`: any text as a recipe and as the description of a model. What is accepted keeps the promises of the
//! page format for every head dimension.

use kakeya_codec::layout::{HEADER, PageLayout};
use kakeya_codec::recipe::MAX_SLOTS;
use kakeya_codec::shape::HEAD_DIMS;
use kakeya_codec::{BLOCK, Codec, ModelShape, Recipe};

/// Models up to this many channels or entries of the table of angles also become a codec: above, making one takes longer
/// than an input should.
const SMALL: usize = 1 << 12;

/// See the top of this file.
pub fn recipe(bytes: &[u8]) {
    let Ok(text) = std::str::from_utf8(bytes) else { return };
    // A recipe, or a recipe and a model.
    let (first, second) = text.split_once('\n').unwrap_or((text, text));
    let recipe = Recipe::parse(first).ok();
    if let Some(recipe) = &recipe {
        check(recipe);
    }
    let Ok(shape) = ModelShape::from_json(second) else { return };
    let channels = shape.num_layers * shape.num_kv_heads * shape.head_dim;
    let pairs = shape.rope.as_ref().map_or(0, |r| r.inv_freq.len());
    if channels > SMALL || shape.max_blocks() * pairs > SMALL {
        return;
    }
    let recipe = recipe.unwrap_or_else(|| Recipe::parse("kakeya-free-4.6x").expect("a preset"));
    if let Ok(codec) = Codec::new(&recipe, &shape, None) {
        assert_eq!(codec.fingerprint().len(), 64);
        assert!(!codec.describe().to_string().is_empty());
    }
}

fn check(recipe: &Recipe) {
    assert!(recipe.to_json()["needs_calibration"].is_boolean());
    for d in HEAD_DIMS {
        let Ok(bytes) = recipe.page_bytes(d) else { continue };
        let ratio = (4 * d * BLOCK) as f64 / bytes as f64;
        assert!(ratio >= recipe.ratio && bytes.is_multiple_of(16), "{recipe:?} D={d}: {bytes} bytes");
        for slots in [recipe.min_slots, recipe.sink_slots] {
            let l = PageLayout::new(recipe, d, bytes, slots).expect("page_bytes accepted both");
            assert!(
                l.codes_offset == HEADER
                    && l.side_offset == HEADER + l.code_bytes
                    && l.slots_offset == l.side_offset + l.side_bytes
                    && l.slots_offset + l.num_slots * l.slot_bytes <= bytes
                    && (slots..=MAX_SLOTS).contains(&l.num_slots)
                    && l.side_offset.is_multiple_of(16)
                    && l.slots_offset.is_multiple_of(16),
                "{recipe:?} D={d}: {l:?}"
            );
        }
    }
}
