//! Target `calibration`: any bytes as an artefact, and an artefact of any statistics. A codec that is made of one seals and
//! opens a block.
//!
//! The first byte decides: even, the rest is the file; odd, the rest are statistics, floats by turns, of a valid file.

use kakeya_codec::{BLOCK, Codec, ModelShape, Recipe, Rows};

use crate::common;
use crate::model::artefact;
use crate::source::Source;

/// A model whose artefact is short: the fuzzer's changes then mostly hit something.
pub fn shape() -> ModelShape {
    ModelShape {
        num_layers: 1,
        num_kv_heads: 1,
        num_q_heads: 1,
        max_position: 512,
        ..common::shape(64, false, 64)
    }
}

/// See the top of this file.
pub fn calibration(bytes: &[u8]) {
    let mut source = Source::new(bytes);
    let (what, shape) = (source.u8(), shape());
    let recipe = ["kakeya-4.6x", "kakeya-4.6x-trellis", "kakeya-6.4x-lloyd-max", "kakeya-3.5x"];
    let recipe = Recipe::parse(recipe[usize::from(what >> 1 & 3)]).expect("a preset");
    let file = match what & 1 {
        0 => source.rest().to_vec(),
        _ => {
            // Over and over: few bytes then decide about all channels.
            let given = source.rest();
            let mut values = Source::new(given);
            artefact(&shape, |_| {
                if values.is_empty() {
                    values = Source::new(given);
                }
                values.f32()
            })
        }
    };
    let Ok(codec) = Codec::new(&recipe, &shape, Some(&file)) else { return };
    assert!(!codec.describe().to_string().is_empty());
    let d = shape.head_dim;
    let x: Vec<f32> = (0..BLOCK * d).map(|i| (i * 7919 % 257) as f32 / 64.0 - 2.0).collect();
    let mut page = vec![0; codec.page_bytes()];
    codec.seal(0, 0, 1, Rows::dense(&x, d), Rows::dense(&x, d), &mut page).expect("finite rows");
    let (mut k, mut v) = (vec![0.0; BLOCK * d], vec![0.0; BLOCK * d]);
    codec.open(0, 0, &page, &mut k, &mut v).expect("a page that was just sealed");
    assert!(k.iter().chain(&v).all(|x| x.is_finite()), "a sealed page opens as numbers");
}
