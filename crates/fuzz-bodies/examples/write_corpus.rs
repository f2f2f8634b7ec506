//! Writes the inputs from which fuzzing starts into `fuzz/corpus`: presets, a small artefact, golden pages, and one sound
//! sequence of calls. Names are fixed, so writing again changes nothing. What fuzzing adds to them stands beside them.

#[path = "../../codec/tests/common/mod.rs"]
mod common;

use std::path::{Path, PathBuf};

use kakeya_codec::{ModelShape, Recipe};

fn put(target: &str, name: &str, bytes: &[u8]) {
    let folder = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../fuzz/corpus").join(target);
    std::fs::create_dir_all(&folder).expect("the corpus can be written");
    std::fs::write(folder.join(name), bytes).expect("the corpus can be written");
}

/// Eight bytes for `model` (src/model.rs): a recipe at a head dimension, with the golden pages' statistics.
fn key(quantizer: u8, free: bool, ratio: u8, d: usize) -> [u8; 8] {
    let dim = match d {
        96 => 5,
        128 => 6,
        256 => 7,
        _ => 0,
    };
    let slots = if free { 0x44 } else { 0x41 };
    [dim | quantizer << 3 | u8::from(free) << 5, ratio, slots, 0, 0, 0, 7, 0]
}

fn main() {
    for name in Recipe::presets() {
        put("recipe", &format!("preset-{name}"), name.as_bytes());
    }
    let model = r#"{"num_layers":2,"num_kv_heads":2,"num_q_heads":4,"head_dim":64,"max_position":1024,"rope":{"rotary_dim":4,"interleaved":true,"inv_freq":[1.0,0.01]}}"#;
    let full = r#"{"base":"kakeya-free-4.6x","name":"n","ratio":4.0,"quantizer":"lloyd-max","calibrated":false,"min_slots":2,"sink_slots":4,"k_weight":6.0,"menu":16}"#;
    put("recipe", "json", full.as_bytes());
    put("recipe", "model", model.as_bytes());
    put("recipe", "json-and-model", format!("{full}\n{model}").as_bytes());

    // The model of the target `calibration`.
    let s = ModelShape {
        num_layers: 1,
        num_kv_heads: 1,
        num_q_heads: 1,
        max_position: 512,
        ..common::shape(64, false, 64)
    };
    let artefact = common::artefact(&s, 7);
    for recipe in 0..4 {
        put("calibration", &format!("file-{recipe}"), &[&[2 * recipe][..], &artefact].concat());
        put("calibration", &format!("statistics-{recipe}"), &[2 * recipe + 1, 2, 40, 0, 4, 6]);
    }

    let golden = Path::new(env!("CARGO_MANIFEST_DIR")).join("../codec/tests/golden");
    let recipes: [(&str, u8, bool, u8); 5] = [
        ("kakeya-4.6x-trellis", 2, false, 255),
        ("kakeya-4.6x-lloyd-max", 1, false, 255),
        ("kakeya-4.6x", 0, false, 255),
        ("kakeya-6.4x-trellis", 2, false, 254),
        ("kakeya-free-4.6x-trellis", 2, true, 255),
    ];
    for (i, (recipe, quantizer, free, ratio)) in recipes.into_iter().enumerate() {
        for d in [64, 96, 128, 256] {
            let key = key(quantizer, free, ratio, d);
            if d == 64 || i == d / 64 {
                let page =
                    std::fs::read(golden.join(format!("v1-{recipe}-d{d}.page"))).expect("a golden page");
                // Layer 1, head 0; exactly these bytes.
                put("page", &format!("golden-{recipe}-d{d}"), &[&key[..], &[1, 0, 1], &page].concat());
            }
            // Layer 1, head 0, block 0, with attention; byte 20 damaged; natural rows.
            put(
                "scalar_simd",
                &format!("{recipe}-d{d}"),
                &[&key[..], &[1, 0, 0, 1, 20, 0, 5, 0, 3]].concat(),
            );
            put("device", &format!("{recipe}-d{d}"), &[&[0], &key[..], &[1, 0, 0, 20, 0, 5, 0, 3]].concat());
        }
    }
    for width in 0..6 {
        put("device", &format!("units-{width}"), &[&[3, width][..], &[0x5a; 96]].concat());
    }

    // Zeros are the arguments that are right. Rows of noise into K, V and Q; indices of 100 tokens after 60; write; attend.
    let fill = |part: u8| [3, part, 3, 0, 9, 0];
    let indices = [4, 20, 100, 0];
    let write = [&[7, 0, 0, 0, 100][..], &[0; 19]].concat();
    let attend = [&[9, 0, 0, 0, 0, 100, 0][..], &[0; 33]].concat();
    put("abi", "step", &[&[0][..], &fill(0), &fill(1), &fill(2), &indices, &write, &attend].concat());
    // Seal, open, describe, layout.
    let calls = [&[5][..], &[0; 15], &[6], &[0; 8], &[1, 0, 4], &[0; 8], &[2], &[0; 5]].concat();
    put("abi", "seal-and-open", &[&[0][..], &fill(0), &fill(1), &calls].concat());
    for recipe in 0..8 {
        for model in [0, 2, 5] {
            put("abi", &format!("codec-{recipe}-{model}"), &[0, 0, recipe, model, 0, 0]);
        }
    }
}
