//! Writes inputs to start from: `cargo run -p kakeya-fuzz --example seeds`. A fuzzer would be long in finding an artefact.

use kakeya_codec::Recipe;
use std::path::Path;

fn main() {
    let corpus = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../fuzz/corpus");
    let put = |target: &str, name: &str, bytes: &[u8]| {
        std::fs::create_dir_all(corpus.join(target)).unwrap();
        std::fs::write(corpus.join(target).join(name), bytes).unwrap();
    };
    put("calibration", "artefact", &kakeya_fuzz::artefact(&kakeya_fuzz::shape(64), 7));
    for name in Recipe::presets() {
        put("recipe", &name, name.as_bytes());
        put(
            "recipe",
            &format!("{name}.json"),
            Recipe::parse(&name).unwrap().to_json().to_string().as_bytes(),
        );
    }
    // Every model once, with nothing else said.
    for i in 0..kakeya_fuzz::models().len() as u8 {
        for target in ["page", "scalar_simd", "device"] {
            put(target, &format!("model{i}"), &[i]);
        }
    }
    put("abi", "zeros", &[0; 300]);
}
